"""Splits rows into training, held-out and confirmation rows, by their content."""

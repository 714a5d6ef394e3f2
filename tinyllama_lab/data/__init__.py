"""Rows from anywhere to training and held-out rows."""

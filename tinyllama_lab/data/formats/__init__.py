"""Finds out what the columns of a data set hold, and refuses sets that cannot be trained on."""

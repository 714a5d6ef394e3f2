"""Turns files and data sets from anywhere into training and held-out rows."""

"""What the trials of a study show: comparisons, intervals, the recommendation."""

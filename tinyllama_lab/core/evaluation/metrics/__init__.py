"""Metrics that compare generations with references."""

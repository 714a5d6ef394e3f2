"""Mirrors a study into MLflow."""

"""Shells that Hydra discovers; the work is done in `tinyllama_lab.sweep`."""

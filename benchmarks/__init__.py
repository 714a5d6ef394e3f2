"""Compares this project with its peers on the same trials, tokens and machine."""

"""Runs the trials of a plan: packs them, hands them to workers, shows progress."""

"""Trains the adapters of a pack: the loop, the schedule, checkpoints and memory."""

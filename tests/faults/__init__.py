"""Faults that are injected and counted: all by `make faults`, a few by `make test`."""

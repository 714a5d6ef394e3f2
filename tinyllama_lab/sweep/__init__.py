"""The driver half: plans which trials are missing, hands them to workers, records results."""

"""The worker half: loads a base once, then trains, evaluates and saves every trial of a pack."""

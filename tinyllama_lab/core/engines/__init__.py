"""Engines run forward and backward for one adapter (PEFT) or for many (packed)."""

"""Scores adapters and bases: losses, generations, latency and benchmark tasks."""

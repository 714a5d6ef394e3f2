"""Reads rows from files: CSV, JSON, Parquet and Arrow, compressed or not."""

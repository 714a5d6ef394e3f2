"""Reads tables from files: CSV, JSON, Parquet and Arrow, in any encoding."""

"""Loads base models and their tokenizers, and puts adapters on them."""

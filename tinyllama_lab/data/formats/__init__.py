"""Recognises columns and chat formats, and reads rows from them."""

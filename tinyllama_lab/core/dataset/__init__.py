"""Rows as tokens: prompts, chat templates and labels."""

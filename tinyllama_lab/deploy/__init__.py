"""Uses a finished adapter: chat, merge, export, and measurement of what was exported."""

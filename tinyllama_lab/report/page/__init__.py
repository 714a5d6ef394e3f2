"""The HTML page of a study, its charts and its exports."""

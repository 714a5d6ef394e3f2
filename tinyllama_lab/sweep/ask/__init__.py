"""`ask`: the seeds, rows and cost that a question needs, before anything is trained."""

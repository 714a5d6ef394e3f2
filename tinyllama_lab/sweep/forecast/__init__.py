"""`python -m tinyllama_lab plan` and `--dry-run`: what a sweep needs, before it is started."""

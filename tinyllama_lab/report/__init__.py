"""From result files to tables, sentences and pages; needs neither torch nor a tracking server."""

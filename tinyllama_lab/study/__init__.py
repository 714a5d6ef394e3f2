"""The files on disk: studies, trials, packs and events, read and written here alone."""

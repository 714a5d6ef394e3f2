"""The files on disk: studies, trials, packs and events. All reads and writes of them are here."""

"""From result files to what people read. No torch, and no tracking server, is needed."""

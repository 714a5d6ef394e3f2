"""Measures this project against its peers: same trials, same tokens, same machine."""

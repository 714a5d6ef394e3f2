"""`doctor`: says what on this machine would stop or slow down a command."""

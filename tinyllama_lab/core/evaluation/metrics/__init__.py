"""What generations are scored with."""

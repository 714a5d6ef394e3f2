"""Many adapters over one frozen Llama in the same forward and backward pass."""

"""Checkpoints on the Hugging Face hub: an address, a client with exact range reads, the cache."""

"""Checkpoints made of others."""

"""Masks of what is principal, or low, in a checkpoint: how they are made and verified."""

"""Deltas: everything needed to rebuild one checkpoint from another."""

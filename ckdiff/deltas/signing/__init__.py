"""Signatures of deltas and weight versions: what is signed, by whom, and what is used then."""

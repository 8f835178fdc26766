"""A run over time: its plan, how it is carried out, and what it leaves on the disk."""

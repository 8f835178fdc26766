"""The spectrum of an update: its plan, one matrix, and how it is shown."""

"""Runs over time, and the shape of their updates: timelines, structure, spectra."""

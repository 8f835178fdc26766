"""Masks made of masks, and masks in the formats of other tools."""

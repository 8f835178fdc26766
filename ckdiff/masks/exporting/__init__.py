"""Masks in the formats that other tools read: one file per format, imported when it is used."""

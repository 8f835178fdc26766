"""Masks made elsewhere: files of other tools -> a mask store."""

"""Outputs being written: locked, whole or not at all, resumable where they are stores."""

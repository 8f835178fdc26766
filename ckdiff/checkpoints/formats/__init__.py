"""What the bytes of a checkpoint mean."""

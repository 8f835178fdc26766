"""Where the bytes of a checkpoint are: on the disk, on the hub."""

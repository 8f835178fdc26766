"""Weight versions: the stream of directories that reinforcement learning publishes."""

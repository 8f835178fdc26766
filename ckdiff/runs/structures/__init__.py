"""Where in its matrices an update is: what is counted, measured, kept and shown."""

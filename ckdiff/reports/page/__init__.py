"""A report as one HTML file: no network, no server, nothing beside it."""

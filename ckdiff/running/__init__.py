"""Running chunk tasks: on our own threads, or on the workers of a Dask cluster."""

"""The parts of a diff; :mod:`ckdiff.engine` puts them together."""

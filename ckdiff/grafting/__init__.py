"""The parts of a graft; :mod:`ckdiff.grafts` puts them together."""

"""The parts of a graft; :mod:`ckdiff.grafts.graft` puts them together."""

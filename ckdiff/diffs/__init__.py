"""The parts of a diff; :mod:`ckdiff.diffs.plan` puts them together."""

"""The parts of a diff; :mod:`ckdiff.diffs.plan` and :mod:`ckdiff.diffs.run` put them together."""

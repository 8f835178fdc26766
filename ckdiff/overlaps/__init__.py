"""Several stores side by side: counts, chance; :mod:`ckdiff.overlaps.overlap` compares them."""

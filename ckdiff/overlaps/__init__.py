"""Several stores side by side: counts, chance; :mod:`ckdiff.agreement` compares them."""

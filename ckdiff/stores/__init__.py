"""What a mask store is made of; :mod:`ckdiff.store` opens one."""

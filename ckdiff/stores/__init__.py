"""What a mask store is made of; :mod:`ckdiff.stores.maskstore` opens one."""

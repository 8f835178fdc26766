"""A local checkpoint that follows a stream of weight versions, in place."""

from __future__ import annotations

import os


def follow(
    local: str | os.PathLike[str],
    stream: str | os.PathLike[str],
    target: int | None = None,
    *,
    verify_signature: str | os.PathLike[str] | None = None,
) -> int:
    """Bring the checkpoint ``local`` to the version ``target`` of ``stream``, or to the newest.

    Returns the version that it is at afterwards. If it is there already, nothing is done.
    ``verify_signature`` is a file of public keys: one of them must have signed each version that is
    used. Raises the errors of ``apply_in_place``.
    """
    from ckdiff.deltas.versions.inplace import apply_in_place

    if verify_signature is not None:
        from ckdiff.deltas import apply

        found = apply.apply_in_place(
            local, stream, target=target, verify_signature=verify_signature
        )
        return found.version or 0
    return apply_in_place(local, stream, target=target).version or 0

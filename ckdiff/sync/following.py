"""A local checkpoint that follows a stream of weight versions, in place."""

from __future__ import annotations

import os


def follow(
    local: str | os.PathLike[str], stream: str | os.PathLike[str], target: int | None = None
) -> int:
    """Bring the checkpoint ``local`` to the version ``target`` of ``stream``, or to the newest.

    Gives the version that it is at then. Nothing is done where it is there already. Raises what
    applying in place raises.
    """
    from ckdiff.deltas.versions.inplace import apply_in_place

    return apply_in_place(local, stream, target=target).version

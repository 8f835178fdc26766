"""A local checkpoint that is only ever changed by what was signed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ckdiff.checkpoints.halfway import is_half_way
from ckdiff.deltas.signing.chosen import verified
from ckdiff.deltas.signing.verifying import Signers
from ckdiff.deltas.versions.form import read_marker
from ckdiff.deltas.versions.inplace import recover


@contextmanager
def verified_in_place(
    signers: Signers,
    local: str | os.PathLike[str],
    paths: Sequence[str],
    target: int | None,
    base_version: int | None,
) -> Iterator[tuple[list[str], int | None]]:
    """What to apply in place instead of ``paths``, and to which version; see ``verified``.

    What was stopped before is finished first: at which version the checkpoint is decides what of a
    stream is used. Copies lie beside the checkpoint meanwhile.
    """
    if is_half_way(local) is not None:
        recover(local)
    where = Path(os.path.abspath(local))
    marker = read_marker(str(where))
    at = (base_version or 0) if marker is None else marker
    with verified(signers, paths, where, target, at) as found:
        yield found

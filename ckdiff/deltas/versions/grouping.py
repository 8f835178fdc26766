"""Tensors that are one piece of work together: a model has many small ones."""

from __future__ import annotations

from collections.abc import Iterator

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.versions.encoding import WINDOW

GROUP_BYTES = 2 * WINDOW  #: of several tensors, at most
_TENSORS = 256


def grouped(nbytes: IntArray) -> Iterator[tuple[int, int]]:
    """[first, stop) of runs of tensors that are together one piece of work."""
    first, held = 0, 0
    for i, size in enumerate(nbytes.tolist()):
        if i > first and (held + size > GROUP_BYTES or i - first == _TENSORS):
            yield first, i
            first, held = i, 0
        held += size
    if first < len(nbytes):
        yield first, len(nbytes)

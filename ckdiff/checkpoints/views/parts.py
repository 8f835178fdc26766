"""A checkpoint under other names, some of whose tensors are parts of what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt
import xxhash

from ckdiff.checkpoints.gathering import PieceReader
from ckdiff.checkpoints.pieces import Contents, Piece, borders
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SpanReader, TensorTable
from ckdiff.checkpoints.turned import Clusters, clusters_of
from ckdiff.checkpoints.views.unfusing import Part, SideView
from ckdiff.checkpoints.views.wrapping import View
from ckdiff.dtypes import DTYPES


class PartsView(View):
    """What ``view`` says of ``inner``: some of its tensors, and parts of others."""

    def __init__(self, inner: Checkpoint, view: SideView) -> None:
        self.parts = view.parts
        super().__init__(inner, _table(inner.table, view))
        #: for each tensor that of the inner checkpoint which holds it, or its first piece
        self.within: IntArray = np.concatenate(
            [view.kept, np.array([part.source for part in view.parts], np.int64)]
        )
        self._kept = len(view.kept)
        # where a part lies in one run, it is read where it is
        self._begins = np.zeros(len(self.table), np.int64)
        self._pieces: dict[int, tuple[Piece, ...]] = {}
        for at, part in enumerate(view.parts, self._kept):
            if _in_one_run(part):
                self.within[at], self._begins[at] = part.pieces[0].source, part.pieces[0].begin
            else:
                self._pieces[at] = part.pieces

    @cached_property
    def file_index(self) -> npt.NDArray[np.int32]:
        """See Checkpoint. Gathered parts are in no one place."""
        found = self.inner.file_index[self.within]
        found[[*self._pieces]] = -1
        return found

    @cached_property
    def offset(self) -> IntArray:
        """See Checkpoint."""
        found = self.inner.offset[self.within]
        found[found >= 0] += self._begins[found >= 0]
        found[[*self._pieces]] = -1
        return found

    @property
    def borders(self) -> Mapping[int, IntArray]:
        """See Checkpoint: those of its own pieces, and of what it shows as it is."""
        shapes = self.table.shapes
        found = {at: borders(shapes[at], pieces) for at, pieces in self._pieces.items()}
        inner = self.inner.borders
        for at, source in enumerate(self.within.tolist()):
            if source not in inner or at in self._pieces:
                continue
            width = DTYPES[self.table.dtypes[at]].bits // 8
            within = inner[source] - int(self._begins[at]) // max(width, 1)
            found[at] = within[(within > 0) & (within < prod(shapes[at]))]
        return found

    @property
    def scattered(self) -> bool:
        """See Checkpoint."""
        return bool(self._clusters.of)

    def reader(self) -> SpanReader:
        """See Checkpoint."""
        places = self.within.astype(np.int32)
        places[[*self._pieces]] = -1
        begins = np.where(places < 0, -1, self._begins)
        contents = Contents(self.table, places, begins, pieces=self._pieces)
        mapped = self.inner.reader_memory(1) == 0
        return PieceReader(self.inner.reader(), contents, self._clusters, mapped=mapped)

    @cached_property
    def _clusters(self) -> Clusters:
        return clusters_of(self.table, self._pieces)

    def reader_memory(self, window: int) -> int:
        """See Checkpoint: what is gathered, besides what its source takes."""
        if not self._pieces:
            return super().reader_memory(window)
        asked = super().reader_memory(PieceReader.asked(window))
        return asked + PieceReader.memory(window) + self._clusters.memory(window)

    def read_ahead(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See Checkpoint; gathered parts are left to their readers."""
        whole = ~np.isin(tensors, list(self._pieces))
        tensors, starts, nbytes = tensors[whole], starts[whole], nbytes[whole]
        self.inner.read_ahead(self.within[tensors], self._begins[tensors] + starts, nbytes)

    def _way(self) -> str:
        digest = xxhash.xxh3_128(self.within.tobytes())
        digest.update(self._begins.tobytes())
        digest.update(repr([(part.name, part.pieces) for part in self.parts]).encode())
        return f"parts {digest.hexdigest()}"


def _table(inner: TensorTable, view: SideView) -> TensorTable:
    kept: Sequence[int] = view.kept.tolist()
    dtypes = [inner.dtypes[i] for i in kept] + [inner.dtypes[part.source] for part in view.parts]
    shapes = [inner.shapes[i] for i in kept] + [part.shape for part in view.parts]
    sizes = [prod(part.shape) * DTYPES[inner.dtypes[part.source]].bits // 8 for part in view.parts]
    return TensorTable(
        [*view.names, *(part.name for part in view.parts)],
        dtypes,
        shapes,
        np.concatenate([inner.nbytes[view.kept], np.array(sizes, np.int64)]),
        inner.absent,
    )


def _in_one_run(part: Part) -> bool:
    """Whether a part is packed in one place."""
    return len(part.pieces) == 1 and part.pieces[0].packed and part.pieces[0].shape == part.shape

"""The safetensors files that any checkpoint would be, as they are planned before they are written.

What has no files of its own, or files of another format, is given those that the safetensors
library would write: tensors of wide dtypes first, then by name, in one file, or in as many as a
limit makes of them, divided, named and listed as transformers does it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckdiff.checkpoints.formats.safetensors import HEADER_LIMIT
from ckdiff.checkpoints.gathering import Located
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SourceFile, SpanReader, TensorTable
from ckdiff.checkpoints.views.wrapping import View
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError, printable

NAME = "model.safetensors"
_SUFFIX = ".safetensors"
_METADATA = "__metadata__"
#: the library sorts by the order in which it lists its dtypes, the last first
_RANK = {name: -i for i, name in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file that is to be."""

    name: str
    head: bytes  #: its 8 bytes of length included
    tensors: IntArray  #: positions in the table, in the order in which they lie in the file
    begins: IntArray  #: for each of these its first byte, counted from the start of the file
    size: int  #: bytes


def plan_shards(
    table: TensorTable,
    limit: int | None = None,
    *,
    name: str = NAME,
    metadata: Mapping[str, str] | None = None,
) -> list[Shard]:
    """The files that hold all of ``table``: one called ``name``, or with ``limit`` as many as it
    takes for none to have more than so many bytes of tensors, unless it is one tensor.

    They are filled in the order of the table, but for tensors of more than the limit, and named
    ``NAME-00001-of-0000N``. ``metadata`` goes into each. Raises CheckpointError for names and
    headers that no file can have.
    """
    groups = _grouped(table.nbytes.tolist(), limit)
    if len(groups) == 1:
        return [_shard(table, groups[0], name, metadata)]
    stem, count = name.removesuffix(_SUFFIX), len(groups)
    return [
        _shard(table, group, f"{stem}-{i:05d}-of-{count:05d}{_SUFFIX}", metadata)
        for i, group in enumerate(groups, 1)
    ]


def _grouped(sizes: Sequence[int], limit: int | None) -> list[list[int]]:
    """Positions of the tensors of each file."""
    if limit is None:
        return [list(range(len(sizes)))]
    groups: list[list[int]] = []
    current: list[int] = []
    filled = 0
    for i, size in enumerate(sizes):
        if size > limit:  # its file comes before the one that others are still put into
            groups.append([i])
            continue
        if current and filled + size > limit:
            groups.append(current)
            current, filled = [], 0
        current.append(i)
        filled += size
    return [*groups, current] if current or not groups else groups


def index_of_shards(table: TensorTable, shards: Sequence[Shard]) -> bytes:
    """The JSON index of several files, as transformers writes it."""
    where = {table.names[i]: shard.name for shard in shards for i in shard.tensors.tolist()}
    index = {"metadata": {"total_size": int(table.nbytes.sum())}, "weight_map": where}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _shard(
    table: TensorTable, group: Sequence[int], name: str, metadata: Mapping[str, str] | None
) -> Shard:
    order = sorted(group, key=lambda i: (_RANK[table.dtypes[i]], table.names[i]))
    tensors = np.array(order, np.int64)
    ends = np.cumsum(table.nbytes[tensors])
    begins = ends - table.nbytes[tensors]
    header: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    for i, begin, end in zip(order, begins.tolist(), ends.tolist(), strict=True):
        if table.names[i] == _METADATA:
            raise CheckpointError(
                f"a tensor is called {_METADATA}, which safetensors keeps for metadata",
                hint="rename it",
            )
        header[table.names[i]] = {
            "dtype": table.dtypes[i],
            "shape": list(table.shapes[i]),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise CheckpointError(
            f"{printable(name)} would have a header of {len(text):,} bytes, more than "
            f"{HEADER_LIMIT:,}",
            hint="write smaller files",
        )
    head = len(text).to_bytes(8, "little") + text
    size = len(head) + int(table.nbytes[tensors].sum())
    return Shard(name, head, tensors, begins + len(head), size)


def as_files(
    checkpoint: Checkpoint,
    limit: int | None = None,
    *,
    name: str = NAME,
    metadata: Mapping[str, str] | None = None,
) -> Checkpoint:
    """The same tensors, in the order of the safetensors files that they would be: see plan_shards.

    ``files``, ``head``, ``index``, ``file_index`` and ``offset`` speak of these, and readers read
    what ``checkpoint`` has, which it owns. Nothing of it is open: no output may replace what
    ``checkpoint`` has open, which has to be asked of that. Raises CheckpointError.
    """
    return _AsFiles(checkpoint, plan_shards(checkpoint.table, limit, name=name, metadata=metadata))


def as_file(checkpoint: Checkpoint, name: str = NAME) -> Checkpoint:
    """``as_files``, but one, byte for byte as the safetensors library writes it."""
    return as_files(checkpoint, name=name)


def with_files(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself where it is in safetensors files, else ``as_file``."""
    return checkpoint if checkpoint.in_files else as_file(checkpoint)


class _AsFiles(View):
    """See as_files."""

    def __init__(self, inner: Checkpoint, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._order: IntArray = np.concatenate([shard.tensors for shard in shards])
        order, table = self._order.tolist(), inner.table
        counts = [len(shard.tensors) for shard in shards]
        self.file_index = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self.offset = np.concatenate([shard.begins for shard in shards])
        self._index = index_of_shards(table, shards) if len(shards) > 1 else None
        super().__init__(
            inner,
            TensorTable(
                [table.names[i] for i in order],
                [table.dtypes[i] for i in order],
                [table.shapes[i] for i in order],
                table.nbytes[self._order],
                table.absent,
            ),
        )

    def _describe(self) -> None:
        super()._describe()
        self.files = [SourceFile(shard.name, shard.size) for shard in self._shards]
        self.open_files, self.index_name = (), None
        if self._index is not None:
            stem = self._shards[0].name.rpartition("-00001-of-")[0]
            self.index_name = f"{stem}{_SUFFIX}.index.json"

    @property
    def in_files(self) -> bool:
        """See Checkpoint: in those that it would be."""
        return True

    def head(self, file: int) -> bytes:
        """See Checkpoint."""
        return self._shards[file].head

    def index(self) -> bytes | None:
        """See Checkpoint."""
        return self._index

    @property
    def borders(self) -> Mapping[int, IntArray]:
        """See Checkpoint."""
        inner = self.inner.borders
        return {at: inner[i] for at, i in enumerate(self._order.tolist()) if i in inner}

    def reader(self) -> SpanReader:
        """See Checkpoint."""
        order = self._order.astype(np.int32)
        return Located(self.inner.reader(), order, np.zeros(len(order), np.int64))

    def read_ahead(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See Checkpoint."""
        self.inner.read_ahead(self._order[tensors], starts, nbytes)

    def _way(self) -> str:
        return f"files {[(file.name, file.size) for file in self.files]}"

    def recipe(self) -> str:
        """See Checkpoint: there is none, what is opened by its path has its own files."""
        return Checkpoint.recipe(self)

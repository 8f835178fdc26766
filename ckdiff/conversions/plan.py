"""What a conversion writes: which files, and where in them each tensor goes, in which dtype."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckdiff.checkpoints.protocol import Checkpoint, IntArray, TensorTable
from ckdiff.checkpoints.views.canonical import Shard, index_of_shards, plan_shards
from ckdiff.checkpoints.weightnames import is_adapter, weight_name
from ckdiff.conversions.dtypes import chosen_dtypes
from ckdiff.conversions.metadata import kept_metadata
from ckdiff.errors import CheckpointError, printable
from ckdiff.layout import Layout, bits_of
from ckdiff.outputs.rebuilt import FilePlan

CHUNK = 1 << 24  #: elements of a unit of work
_SUFFIX = ".safetensors"
_MODEL, _ADAPTER, _DIFFUSION = "model", "adapter_model", "diffusion_pytorch_model"


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion before any byte is read."""

    checkpoint: Checkpoint
    wanted: str | None  #: the dtype that floats get; None: each keeps its own
    dtypes: list[str]  #: for each tensor the one that it is written in
    untouched: list[str]  #: floats that stay as they are
    files: list[FilePlan]
    indexes: list[tuple[str, bytes]]  #: one, one for each component of a pipeline, or none
    left_out: list[str]  #: keys of metadata that are in no file
    file: IntArray  #: for each tensor the position of its file
    begin: IntArray  #: for each tensor its first byte, counted from the start of the file
    order: IntArray  #: tensors in the order in which they are read
    layout: Layout  #: of these, in that order

    @classmethod
    def of(cls, checkpoint: Checkpoint, wanted: str | None, limit: int) -> Plan:
        """Plan files of at most ``limit`` bytes of tensors. Raises CheckpointError."""
        table = checkpoint.table
        _check_names(checkpoint)
        dtypes, untouched = chosen_dtypes(table, wanted)
        counts = table.nbytes * 8 // np.maximum(bits_of(table.dtypes), 1)
        written = TensorTable(table.names, dtypes, table.shapes, counts * bits_of(dtypes) // 8)
        order = np.lexsort((checkpoint.offset, checkpoint.file_index)).astype(np.int64)
        files = _Files(len(table))
        for folder, names, positions in _parts(checkpoint):
            metadata, left = kept_metadata(checkpoint, names)
            files.left_out += left
            stem = _stem([posixpath.basename(checkpoint.files[i].name) for i in names])
            files.add(written, positions, (folder, stem, metadata), limit)
        return cls(
            checkpoint,
            wanted,
            dtypes,
            untouched,
            files.files,
            files.indexes,
            files.left_out,
            files.file,
            files.begin,
            order,
            Layout(counts[order], CHUNK),
        )

    @property
    def converted(self) -> int:
        """How many tensors are written in another dtype than theirs."""
        stored = self.checkpoint.table.dtypes
        return sum(one != other for one, other in zip(stored, self.dtypes, strict=True))

    @property
    def shared(self) -> list[str]:
        """Tensors whose bytes are those of another, which comes before them."""
        known, found = set[tuple[int, int, int]](), []
        table, checkpoint = self.checkpoint.table, self.checkpoint
        columns = checkpoint.file_index.tolist(), checkpoint.offset.tolist(), table.nbytes.tolist()
        for name, *place in zip(table.names, *columns, strict=True):
            file, begin, size = place
            if file >= 0 and size and (file, begin, size) in known:
                found.append(name)
            known.add((file, begin, size))
        return found


class _Files:
    """The files of a plan as they are added up."""

    def __init__(self, tensors: int) -> None:
        self.files: list[FilePlan] = []
        self.indexes: list[tuple[str, bytes]] = []
        self.left_out: list[str] = []
        self.file: IntArray = np.full(tensors, -1, np.int64)
        self.begin: IntArray = np.full(tensors, -1, np.int64)

    def add(
        self,
        table: TensorTable,
        positions: IntArray,
        where: tuple[str, str, Mapping[str, str]],
        limit: int,
    ) -> None:
        """Add the tensors at ``positions``, which lose ``folder/`` from their names.

        ``where`` is the folder, what the files are called, and their metadata.
        """
        folder, stem, metadata = where
        start = f"{folder}/" if folder else ""
        chosen = positions.tolist()
        part = TensorTable(
            [table.names[i].removeprefix(start) for i in chosen],
            [table.dtypes[i] for i in chosen],
            [table.shapes[i] for i in chosen],
            table.nbytes[positions],
        )
        shards = plan_shards(part, limit, name=f"{stem}{_SUFFIX}", metadata=metadata)
        for shard in shards:
            self._place(start, shard, positions)
        if len(shards) > 1:
            index = f"{start}{stem}{_SUFFIX}.index.json"
            self.indexes.append((index, index_of_shards(part, shards)))

    def _place(self, start: str, shard: Shard, positions: IntArray) -> None:
        tensors = positions[shard.tensors]
        self.file[tensors], self.begin[tensors] = len(self.files), shard.begins
        self.files.append(FilePlan(start + shard.name, shard.head, shard.size))


def _parts(checkpoint: Checkpoint) -> list[tuple[str, list[int], IntArray]]:
    """What is written together: a folder, the files it comes from, positions of the tensors.

    The components of a pipeline lie in folders of their own, and their tensors' names begin with
    these. Everything else is one part.
    """
    names = checkpoint.table.names
    inside = [posixpath.dirname(file.name) for file in checkpoint.files]
    folders = sorted(set(inside))
    of = [next((f for f in folders if f and n.startswith(f"{f}/")), None) for n in names]
    if not folders or not all(folders) or None in of:
        return [("", list(range(len(inside))), np.arange(len(names)))]
    return [
        (
            folder,
            [i for i, one in enumerate(inside) if one == folder],
            np.array([i for i, one in enumerate(of) if one == folder], np.int64),
        )
        for folder in folders
    ]


def _stem(files: Sequence[str]) -> str:
    """What loaders look for in place of files that were called so."""
    stems = [known.stem if (known := weight_name(file)) else file for file in files]
    if stems and all(stem.startswith(_ADAPTER) and is_adapter(stem) for stem in stems):
        return _ADAPTER
    if stems and all(stem.startswith(_DIFFUSION) for stem in stems):
        return _DIFFUSION
    return _MODEL


def _check_names(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for names that no safetensors header can have."""
    for name in checkpoint.table.names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{printable(checkpoint.label)}: the name of the tensor {printable(name)} is not "
                "valid text, so a safetensors file cannot have it",
                hint="rename it where it was saved",
            ) from None

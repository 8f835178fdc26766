"""From the headers of several files to one table of tensors, wherever the files are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.choosing import Shards
from ckdiff.checkpoints.formats.safetensors import Header
from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SourceFile, TensorTable
from ckdiff.errors import CheckpointError, HeaderError

#: problems that one message lists; the rest are counted
PROBLEM_LIMIT = 3


@dataclass(slots=True)
class Joined:
    """What the headers of all files say together."""

    table: TensorTable
    files: list[SourceFile]
    file_index: npt.NDArray[np.int32]  #: for each tensor, the position of its file
    offset: IntArray  #: for each tensor, its first byte counted from the start of that file
    head_sizes: list[int]  #: for each file, the first byte after its header


class JoinedFiles(Checkpoint):
    """A checkpoint in safetensors files, wherever they are: what their headers say of it."""

    def __init__(self, label: str, joined: Joined) -> None:
        self.label = label
        self.table, self.files = joined.table, joined.files
        self.file_index, self.offset = joined.file_index, joined.offset
        self.head_sizes = joined.head_sizes  #: bytes before the tensors of each of ``files``

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}: {len(self.table):,} tensors>"


class Joining:
    """Takes the files of a checkpoint one by one, and finds out what is wrong with them."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._sources: list[SourceFile] = []
        self._headers: list[Header] = []
        self._unread: set[str] = set()
        self._problems = _Problems()

    def add(self, source: SourceFile, header: Header) -> None:
        """A file with its header, in the order of ``shards.names``."""
        self._sources.append(source)
        self._headers.append(header)

    def failed(self, name: str, error: CheckpointError) -> None:
        """A file whose header could not be read."""
        self._problems.add_error(error)
        self._unread.add(name)

    def finish(self, where: str) -> Joined:
        """The table. Raises HeaderError and CheckpointError: one error names the first problems,
        and counts all; ``where`` is how it names the checkpoint.
        """
        self._check_names()
        self._problems.raise_any(where)
        names: list[str] = []
        dtypes: list[str] = []
        shapes: list[tuple[int, ...]] = []
        for header in self._headers:
            names += header.names
            dtypes += header.dtypes
            shapes += header.shapes
        headers = self._headers
        counts = [len(header.names) for header in headers]
        nbytes = np.concatenate([header.nbytes for header in headers])
        return Joined(
            TensorTable(names, dtypes, shapes, nbytes),
            self._sources,
            np.repeat(np.arange(len(headers), dtype=np.int32), counts),
            np.concatenate([header.begins for header in headers]),
            [header.data_start for header in headers],
        )

    def _check_names(self) -> None:
        """Note every tensor that is in two shards, or not where the index says."""
        problems, weight_map = self._problems, self._shards.weight_map
        if weight_map is None and len(self._sources) < 2:
            return
        owner: dict[str, str] = {}
        repeated: set[str] = set()
        for source, header in zip(self._sources, self._headers, strict=True):
            for name in header.names:
                first = owner.setdefault(name, source.name)
                if first != source.name:
                    repeated.add(name)
                    problems.add(f"tensor {shown(name)} is in both {first} and {source.name}")
        if weight_map is None:
            return
        for name, promised in weight_map.items():
            actual = owner.get(name)
            if actual == promised or name in repeated:
                continue
            if actual is not None:
                problems.add(f"tensor {shown(name)} is in {actual} but the index says {promised}")
            elif promised not in self._unread:
                problems.add(f"{promised} has no tensor {shown(name)} but the index says so")
        for name, actual in owner.items():
            if name not in weight_map:
                problems.add(f"tensor {shown(name)} of {actual} is not in the index")


class _Problems:
    """What is wrong with a checkpoint: the first few problems, and how many there are."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.errors: list[CheckpointError] = []
        self.count = 0

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.texts) < PROBLEM_LIMIT:
            self.texts.append(text)

    def add_error(self, error: CheckpointError) -> None:
        self.errors.append(error)
        self.add(error.message)  # one hint stands at the end of all

    def raise_any(self, where: str) -> None:
        """Raise one error for all of it; the error itself where it is the only problem."""
        if not self.count:
            return
        if self.count == len(self.errors) == 1:
            raise self.errors[0]
        headers = [error for error in self.errors if isinstance(error, HeaderError)]
        kind = HeaderError if len(headers) == self.count else CheckpointError
        listed = "; ".join(self.texts)
        if self.count == 1:
            message = f"{where}: {listed}"
        else:
            message = f"{where}: {self.count:,} problems: {listed}"
        if self.count > len(self.texts):
            message += f"; and {self.count - len(self.texts):,} more"
        raise kind(message, hint="fetch or save the checkpoint again, all of it")

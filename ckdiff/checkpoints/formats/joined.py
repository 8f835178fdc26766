"""From the headers of several safetensors files to one table of tensors, wherever the files are."""

from __future__ import annotations

import numpy as np

from ckdiff.checkpoints.choosing import Shards
from ckdiff.checkpoints.formats.safetensors import Header, header_from
from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.checkpoints.pieces import Contents
from ckdiff.checkpoints.places.place import Place
from ckdiff.checkpoints.protocol import SourceFile, TensorTable
from ckdiff.errors import CheckpointError, HeaderError

#: problems that one message lists; the rest are counted
PROBLEM_LIMIT = 3


def read_contents(place: Place) -> Contents:
    """What the safetensors files of ``place`` hold: each tensor must be there once.

    Raises HeaderError for a file that breaks the format and CheckpointError for everything else
    that is wrong: one error names the first problems and counts all.
    """
    joining = Joining(place.shards)
    for i, (file, read) in enumerate(zip(place.files, place.reads(header_end), strict=True)):
        try:
            header = header_from(read, file.size, place.where(i))
            place.check(i)  # it is only worth something if it is that of the file as it was opened
        except HeaderError as error:
            joining.failed(file.name, error)
        except CheckpointError as error:
            if place.remote:  # what keeps one from being read keeps the others too
                raise
            joining.failed(file.name, error)
        else:
            joining.add(file, header)
    return joining.finish(place.described)


def header_end(first: bytes, size: int) -> int:
    """Where the header of a file ends that begins so: it is worth reading ahead."""
    return 8 + int.from_bytes(first[:8], "little")


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

    def finish(self, where: str) -> Contents:
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
        return Contents(
            TensorTable(names, dtypes, shapes, nbytes),
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

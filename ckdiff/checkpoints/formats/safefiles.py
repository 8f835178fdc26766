"""Safetensors files as one checkpoint: from their headers to one table of tensors."""

from __future__ import annotations

import numpy as np

from ckdiff.checkpoints.contents import SHARDING
from ckdiff.checkpoints.explaining import refused_metadata
from ckdiff.checkpoints.formats.registry import FORMATS
from ckdiff.checkpoints.formats.safetensors import Header, header_from
from ckdiff.checkpoints.indexes import check_unlisted, joined_by_index
from ckdiff.checkpoints.pieces import WARNING, Contents
from ckdiff.checkpoints.places.place import Files, Read
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.errors import CheckpointError, HeaderError

#: problems that one message lists; the rest are counted
PROBLEM_LIMIT = 3


def read_contents(files: Files) -> Contents:
    """What safetensors files hold: of each file what the index says, or all of it without one.

    Raises HeaderError for a file that breaks the format and CheckpointError for everything else
    that is wrong: one error names the first problems and counts all.
    """
    headers, described = read_headers(files), files.described
    if any(SHARDING in header.metadata for header in headers):
        return FORMATS["pieces"](files)
    held = [(files.name(i), header.names) for i, header in enumerate(headers)]
    if files.choice.weight_map is None:
        check_unlisted(described, held)
        kept: list[list[bool]] | None = None
        missing, notes = list[str](), list[str]()
    else:
        listed = joined_by_index(described, files.choice.weight_map, held)
        whole = all(map(all, listed.kept))
        kept = None if whole else listed.kept
        missing, notes = list(listed.missing), [f"{WARNING}{text}" for text in listed.warnings]
    stored = _joined(files, headers)
    said = (refused_metadata(files.where(i), header.metadata) for i, header in enumerate(headers))
    stored.refused = next((refused for refused in said if refused is not None), None)
    if kept is None and not missing:
        return stored
    counted = stored if kept is None else _only(stored, np.concatenate(kept))
    counted.table.absent = missing
    counted.notes = notes
    counted.refused = stored.refused
    counted.stored = stored if kept is not None else None
    return counted


def read_headers(files: Files) -> list[Header]:
    """The headers of safetensors files. Raises HeaderError and CheckpointError."""
    headers, problems = [], _Problems()
    for i, read in enumerate(files.reads(header_end)):
        try:
            headers.append(_header(files, i, read))
        except HeaderError as error:
            problems.add(error)
        except CheckpointError as error:
            if files.place.remote:  # what keeps one from being read keeps the others too
                raise
            problems.add(error)
    problems.raise_any(files.described)
    return headers


def _header(files: Files, file: int, read: Read) -> Header:
    header = header_from(read, files.size(file), files.where(file))
    files.check(file)  # it is only worth something if it is that of the file as it was opened
    return header


def header_end(first: bytes, size: int) -> int:
    """Where the header of a file ends that begins so: it is worth reading ahead."""
    return 8 + int.from_bytes(first[:8], "little")


def _joined(files: Files, headers: list[Header]) -> Contents:
    """All tensors of all files."""
    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    for header in headers:
        names += header.names
        dtypes += header.dtypes
        shapes += header.shapes
    counts = [len(header.names) for header in headers]
    return Contents(
        TensorTable(names, dtypes, shapes, np.concatenate([h.nbytes for h in headers])),
        np.repeat(np.arange(files.first, files.first + len(headers), dtype=np.int32), counts),
        np.concatenate([header.begins for header in headers]),
        [header.data_start for header in headers],
    )


def _only(stored: Contents, kept: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Contents:
    """Some of the tensors."""
    table, at = stored.table, np.flatnonzero(kept)
    return Contents(
        TensorTable(
            [table.names[i] for i in at],
            [table.dtypes[i] for i in at],
            [table.shapes[i] for i in at],
            table.nbytes[at],
        ),
        stored.file_index[at],
        stored.offset[at],
        stored.head_sizes,
    )


class _Problems:
    """What is wrong with a checkpoint: the first few problems, and how many there are."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.errors: list[CheckpointError] = []

    def add(self, error: CheckpointError) -> None:
        self.errors.append(error)
        if len(self.texts) < PROBLEM_LIMIT:
            self.texts.append(error.message)

    def raise_any(self, where: str) -> None:
        """Raise one error for all of it; the error itself where it is the only problem."""
        count = len(self.errors)
        if not count:
            return
        if count == 1:
            raise self.errors[0]
        headers = [error for error in self.errors if isinstance(error, HeaderError)]
        kind = HeaderError if len(headers) == count else CheckpointError
        message = f"{where}: {count:,} problems: {'; '.join(self.texts)}"
        if count > len(self.texts):
            message += f"; and {count - len(self.texts):,} more"
        raise kind(message, hint="fetch or save the checkpoint again, all of it")

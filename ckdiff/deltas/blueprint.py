"""What a delta rebuilds: the files of a checkpoint as their headers say, and the windows in them.

The headers are kept verbatim, so that the rebuilt files are the same to the last byte. Tensors are
in the order of the files and their headers; each is cut into windows of the size of a frame, and
windows into groups that are worked on at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckdiff.checkpoints.formats.safetensors import parse_header
from ckdiff.checkpoints.protocol import Checkpoint, IntArray
from ckdiff.deltas.form import FORMS, FRAME_BYTES
from ckdiff.errors import CheckpointError, HeaderError, printable
from ckdiff.outputs.rebuilt import FilePlan

MOST_WINDOWS = 256  # of a group: tensors may be tiny


@dataclass(slots=True)
class Blueprint:
    """The files of a checkpoint, and its tensors in columns."""

    files: list[FilePlan]
    index: tuple[str, bytes] | None  #: name and bytes of the index
    directory: bool  #: whether the checkpoint is a directory, or one file
    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    nbytes: IntArray
    file: IntArray  #: position in ``files``
    begin: IntArray  #: first byte in the file

    @classmethod
    def of(
        cls, files: Sequence[FilePlan], index: tuple[str, bytes] | None, *, directory: bool
    ) -> Blueprint:
        """Read the headers; raises HeaderError."""
        headers = []
        for plan in files:
            if len(plan.head) < 8 or int.from_bytes(plan.head[:8], "little") != len(plan.head) - 8:
                raise HeaderError(f"{printable(plan.name)}: the header has another length")
            data = plan.size - len(plan.head)
            headers.append(parse_header(plan.head[8:], data, printable(plan.name)))
        none = np.zeros(0, np.int64)
        return cls(
            list(files),
            index,
            directory,
            [name for header in headers for name in header.names],
            [dtype for header in headers for dtype in header.dtypes],
            [shape for header in headers for shape in header.shapes],
            np.concatenate([none, *(header.nbytes for header in headers)]),
            np.repeat(np.arange(len(headers)), [len(header.names) for header in headers]),
            np.concatenate([none, *(header.begins for header in headers)]),
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, *, directory: bool | None = None) -> Blueprint:
        """The files of an open checkpoint, with the tensors in the order of its table; without
        ``directory`` they are in one if the checkpoint is. Raises CheckpointError.
        """
        refuse_components(checkpoint)
        if not checkpoint.in_files:
            raise CheckpointError(f"{printable(checkpoint.label)} does not say what its files are")
        plans = [
            FilePlan(source.name, checkpoint.head(i), source.size)
            for i, source in enumerate(checkpoint.files)
        ]
        raw = checkpoint.index()
        index = None if raw is None else (checkpoint.index_name or "", raw)
        if directory is None:
            directory = checkpoint.directory is not None
        return cls.of(plans, index, directory=directory)

    def window_count(self) -> int:
        """How many windows there are; cheap, whatever a header claims."""
        frames = np.array([FORMS[dtype].frame for dtype in self.dtypes], np.int64)
        return sum((-(-self.nbytes // frames)).tolist())

    def windows(self) -> Windows:
        """The windows of all tensors."""
        return Windows(self.dtypes, self.nbytes)


def refuse_components(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for the files of a pipeline: in two of them tensors may have one name,
    and a delta knows tensors by these names alone.
    """
    if checkpoint.components and checkpoint.in_files:
        first = f"{checkpoint.label}/{checkpoint.components[0].rstrip('/')}"
        raise CheckpointError(
            f"{printable(checkpoint.label)} is a pipeline, but a delta is of one model",
            hint=f"make one for each component, such as {printable(first)}",
        )


class Windows:
    """The windows of some tensors, in columns, and their groups."""

    def __init__(self, dtypes: Sequence[str], nbytes: IntArray) -> None:
        frames = np.array([FORMS[dtype].frame for dtype in dtypes], np.int64)
        counts = -(-nbytes // np.maximum(frames, 1))
        self.first: IntArray = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        self.tensor: IntArray = np.repeat(np.arange(len(dtypes)), counts)
        number = np.arange(len(self.tensor)) - self.first[self.tensor]
        self.start: IntArray = number * frames[self.tensor]  #: first byte in the tensor
        self.size: IntArray = np.minimum(
            frames[self.tensor], nbytes[self.tensor] - self.start
        )  #: bytes
        self.groups = self._grouped()

    def __len__(self) -> int:
        return len(self.tensor)

    def within(self, nbytes: IntArray) -> IntArray:
        """Bytes of each window that are among the first ``nbytes`` of its tensor."""
        left: IntArray = np.clip(nbytes[self.tensor] - self.start, 0, self.size)
        return left

    def _grouped(self) -> list[tuple[int, int]]:
        """[first, stop) of runs of windows that are together about as large as one."""
        groups, first, room = [], 0, FRAME_BYTES
        for i, size in enumerate(self.size.tolist()):
            if i > first and (size > room or i - first == MOST_WINDOWS):
                groups.append((first, i))
                first, room = i, FRAME_BYTES
            room -= size
        if first < len(self):
            groups.append((first, len(self)))
        return groups

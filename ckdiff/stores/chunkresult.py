"""What a chunk adds up to, and how the journal keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ckdiff.kernels import HASH_COLUMNS
from ckdiff.layout import IntArray


@dataclass(slots=True)
class ChunkResult:
    """What a chunk adds up to; rows are the tensors of the chunk in address order."""

    tensors: IntArray  #: positions in the layout
    changed: IntArray  #: (rows, rules)
    hashes: npt.NDArray[np.uint64]  #: (rows, HASH_COLUMNS)
    statistics: npt.NDArray[np.float64] | None  #: (rows, statistics.COLUMNS)
    objects: dict[str, tuple[int, str]] = field(default_factory=dict)  #: key -> size, digest
    survived: IntArray | None = None  #: where an adapter was merged, what became of its changes

    def to_bytes(self) -> bytes:
        """For the journal."""
        columns = 0 if self.statistics is None else self.statistics.shape[1]
        head = {
            "rows": len(self.tensors),
            "rules": self.changed.shape[1],
            "statistics": columns,
            "objects": self.objects,
            "survived": None if self.survived is None else self.survived.tolist(),
        }
        parts = [self.tensors, self.changed, self.hashes]
        if self.statistics is not None:
            parts.append(self.statistics)  # type: ignore[arg-type]
        return json.dumps(head).encode() + b"\n" + b"".join(p.tobytes() for p in parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> ChunkResult:
        """What ``to_bytes`` wrote; ValueError where it does not add up."""
        line, _, body = data.partition(b"\n")
        head = json.loads(line)
        rows, rules, columns = head["rows"], head["rules"], head["statistics"]
        words = np.frombuffer(body, np.int64)
        cuts = np.cumsum([rows, rows * rules, rows * HASH_COLUMNS])
        tensors, changed, hashes, rest = np.split(words, cuts)
        return cls(
            tensors,
            changed.reshape(rows, rules),
            hashes.view(np.uint64).reshape(rows, HASH_COLUMNS),
            rest.view(np.float64).reshape(rows, columns) if columns else None,
            {key: (size, digest) for key, (size, digest) in head["objects"].items()},
            None if head["survived"] is None else np.array(head["survived"], np.int64),
        )

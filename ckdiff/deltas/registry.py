"""The encodings of deltas: one line for each; what it is, is in its file."""

from __future__ import annotations

from typing import Any

from ckdiff.naming import Line, Registry

#: of Encoding, whose file reads deltas; and whoever reads a delta looks here for its encoding
ENCODINGS: Registry[Any] = Registry(
    "encoding",
    {
        "packed": Line("ckdiff.deltas.frames:ENCODING", "is the smallest"),
        "indices": Line(
            "ckdiff.deltas.indices:ENCODING", "are positions and values that other tools read"
        ),
    },
)

#: the one of them that a weight version may have too, for readers that are ours
AS_VERSION = "packed"
#: the encodings of weight versions, which are directories and not files; what help says of them
VERSIONED = {
    "xor": "is the next version of a stream that engines read",
    "overwrite": "is the same, and may be applied twice",
}

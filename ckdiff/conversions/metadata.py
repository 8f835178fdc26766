"""What the headers of a checkpoint say besides their tensors, for the files that are written."""

from __future__ import annotations

from collections.abc import Sequence

from ckdiff.checkpoints.contents import SHARDING
from ckdiff.checkpoints.formats.safetensors import parse_header
from ckdiff.checkpoints.protocol import Checkpoint

_FORMAT = {"format": "pt"}  #: without it some loaders refuse a file
_LONGEST = 1 << 20  # bytes of one key and value, and of all that are kept


def kept_metadata(checkpoint: Checkpoint, files: Sequence[int]) -> tuple[dict[str, str], list[str]]:
    """The metadata that files of ours get in place of some of the checkpoint's, and the keys that
    they do not get: those of which these files say different things, and what is too long.

    What only describes the files as they lie there is no part of it. Raises what reading the
    headers raises: SourceChanged and CheckpointError.
    """
    if not checkpoint.in_files:
        return dict(_FORMAT), []
    found, left = dict[str, str](), dict[str, None]()
    room = _LONGEST
    for i in files:
        raw, file = checkpoint.head(i), checkpoint.files[i]
        metadata = parse_header(raw[8:], file.size - len(raw), file.name).metadata
        for key, value in metadata.items():
            if key in (*_FORMAT, SHARDING) or found.get(key) == value:
                continue
            room -= len(key.encode()) + len(value.encode())
            if key in found or room < 0:
                left[key] = None
            else:
                found[key] = value
    return {**_FORMAT, **{k: v for k, v in found.items() if k not in left}}, list(left)

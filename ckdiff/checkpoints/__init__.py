"""Where tensors come from: one file per format behind the protocol in ``protocol.py``."""

from __future__ import annotations

import os

from ckdiff.checkpoints.local import open_local
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import CheckpointError, UsageError

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """Open a checkpoint; an object that is one already is passed through.

    A path is a safetensors file, a directory of them, or the ``*.safetensors.index.json`` of one.
    Raises CheckpointError; the caller closes what it opened.
    """
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if not isinstance(text, str):
            raise UsageError("a checkpoint path must be text, not bytes")
        if text.startswith("hf:/"):
            raise CheckpointError(
                f"{text}: hub paths are not supported by this version",
                hint="download it first with `hf download` and give the directory",
            )
        return open_local(text)
    if not hasattr(path, "table") or not hasattr(path, "reader"):
        raise UsageError(
            f"a checkpoint is a path or what open_checkpoint gives, not {type(path).__name__}"
        )
    return path

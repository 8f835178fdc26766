"""Where tensors come from: one file per format behind the protocol in ``protocol.py``."""

from __future__ import annotations

import os

from ckdiff.checkpoints.hub.address import is_hub_address
from ckdiff.checkpoints.local import open_local
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import UsageError

__all__ = [
    "Checkpoint",
    "bytes_to_download",
    "open_checkpoint",
    "open_for_planning",
    "open_for_streaming",
    "path_for_workers",
]


def open_checkpoint(path: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """Open a checkpoint; an object that is one already is passed through.

    A path is a safetensors file, a directory of them, or the ``*.safetensors.index.json`` of one;
    or one of these on the hub, ``hf://org/name[@revision][/path]``, which is downloaded into the
    hub's cache unless it is there. Raises CheckpointError, and BudgetError for a download that does
    not fit; the caller closes what it opened.
    """
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if not isinstance(text, str):
            raise UsageError("a checkpoint path must be text, not bytes")
        if is_hub_address(text):
            from ckdiff.checkpoints.hub.cached import open_cached

            return open_cached(text)
        return open_local(text)
    if not hasattr(path, "table") or not hasattr(path, "reader"):
        raise UsageError(
            f"a checkpoint is a path or what open_checkpoint gives, not {type(path).__name__}"
        )
    return path


def open_for_planning(path: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """``open_checkpoint``, but of a checkpoint of the hub nothing is fetched except its headers, so
    that only its tensors are known.
    """
    if isinstance(path, (str, os.PathLike)) and is_hub_address(str(os.fspath(path))):
        from ckdiff.checkpoints.hub.headers import open_headers

        return open_headers(str(os.fspath(path)))
    return open_checkpoint(path)


def open_for_streaming(path: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """``open_checkpoint``, but a checkpoint of the hub is not downloaded: its readers fetch what
    they are asked for.
    """
    if isinstance(path, (str, os.PathLike)) and is_hub_address(str(os.fspath(path))):
        from ckdiff.checkpoints.hub.streamed import open_stream

        return open_stream(str(os.fspath(path)))
    return open_checkpoint(path)


def bytes_to_download(checkpoint: Checkpoint) -> int:
    """Bytes that have to be downloaded before a checkpoint opened for planning can be read."""
    ask = getattr(checkpoint, "to_download", None)
    return 0 if ask is None else int(ask())


def path_for_workers(given: str | os.PathLike[str] | Checkpoint, opened: Checkpoint) -> str:
    """The absolute path by which other processes open the files of ``opened`` as well.

    Of a checkpoint of the hub it is that of the cached files: nobody downloads them again, or asks
    which commit it is. Raises UsageError where the caller ``given`` an open checkpoint.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise UsageError(
            "on a cluster every worker opens the checkpoints, and one was given open",
            hint='give its path, or scheduler="threads"',
        )
    return str(getattr(opened, "path", "")) or os.path.abspath(os.fspath(given))

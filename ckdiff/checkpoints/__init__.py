"""Where tensors come from: one file per format behind the protocol in ``protocol.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from ckdiff.checkpoints.places.hub.address import is_hub_address
from ckdiff.checkpoints.places.local import open_local
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import BudgetError, UsageError

__all__ = [
    "Checkpoint",
    "bytes_to_download",
    "no_room",
    "open_checkpoint",
    "open_for_planning",
    "open_for_streaming",
    "open_in",
    "open_together",
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
            from ckdiff.checkpoints.places.hub.cached import open_cached

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
        from ckdiff.checkpoints.places.hub.headers import open_headers

        return open_headers(str(os.fspath(path)))
    return open_checkpoint(path)


def open_for_streaming(path: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """``open_checkpoint``, but a checkpoint of the hub is not downloaded: its readers fetch what
    they are asked for.
    """
    if isinstance(path, (str, os.PathLike)) and is_hub_address(str(os.fspath(path))):
        from ckdiff.checkpoints.places.hub.streamed import open_stream

        return open_stream(str(os.fspath(path)))
    return open_checkpoint(path)


def open_in(
    stack: ExitStack,
    given: str | os.PathLike[str] | Checkpoint,
    opening: Callable[[str | os.PathLike[str] | Checkpoint], Checkpoint] = open_checkpoint,
) -> Checkpoint:
    """``opening`` a checkpoint, which ``stack`` closes unless it was open before."""
    opened = opening(given)
    if opened is not given:
        stack.callback(opened.close)
    return opened


def open_together(
    stack: ExitStack,
    given: Sequence[str | os.PathLike[str] | Checkpoint],
    rehearse: Callable[[list[Checkpoint]], object],
) -> list[Checkpoint]:
    """``open_checkpoint`` for several; ``stack`` closes those that were not open before.

    Where something has to be downloaded, ``rehearse`` is called first with checkpoints of which
    only the tensors are known: what it refuses, and a download that does not fit the disk, costs
    no time. Raises what ``open_checkpoint`` and ``rehearse`` raise.
    """
    sides = [open_in(stack, path, open_for_planning) for path in given]
    headers = [i for i, path in enumerate(given) if sides[i] is not path and _is_partial(sides[i])]
    if not headers:
        return sides
    rehearse(sides)
    _check_room(sides)
    for i in headers:
        sides[i] = sides[i].download()  # type: ignore[attr-defined]
        stack.callback(sides[i].close)
    return sides


def no_room(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Why downloading checkpoints opened for planning would be refused as things stand, or None."""
    try:
        _check_room(checkpoints)
    except BudgetError as error:
        return error.one_line()
    return None


def _check_room(checkpoints: Sequence[Checkpoint]) -> None:
    partial = [checkpoint.label for checkpoint in checkpoints if _is_partial(checkpoint)]
    if not partial:
        return
    from ckdiff.checkpoints.places.hub.cache import check_room
    from ckdiff.checkpoints.places.hub.settings import Settings

    needed = bytes_to_download(checkpoints)
    check_room(Settings.of_environment().cache, needed, " and ".join(partial))


def _is_partial(checkpoint: Checkpoint) -> bool:
    """Whether only its headers were fetched."""
    return hasattr(checkpoint, "download")


def bytes_to_download(checkpoints: Iterable[Checkpoint]) -> int:
    """Bytes that have to be downloaded before checkpoints opened for planning can be read; what
    two of them share counts once.
    """
    missing: dict[tuple[str, ...], int] = {}
    for checkpoint in checkpoints:
        ask = getattr(checkpoint, "missing", None)
        missing |= {} if ask is None else ask()
    return sum(missing.values())


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

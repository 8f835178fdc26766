"""Opening checkpoints: which kind of one a path means, and what is done to several together."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from ckdiff.budget import format_size
from ckdiff.checkpoints.files import FileCheckpoint
from ckdiff.checkpoints.pieces import NO_KEY, UNUSED_KEY
from ckdiff.checkpoints.places.hub.address import is_hub_address
from ckdiff.checkpoints.places.local import local_place
from ckdiff.checkpoints.places.place import Place
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import BudgetError, CheckpointError, UsageError, printable
from ckdiff.options import checked_text

_log = logging.getLogger(__name__)
_NAMED = 4  #: files of a checkpoint that are named in the log


class HasState(Protocol):
    """A module of torch, or what is like one."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors by name."""


#: what the API takes
Given = str | os.PathLike[str] | Checkpoint | Mapping[str, Any] | HasState


def open_checkpoint(path: Given, *, key: str | None = None) -> Checkpoint:
    """Open a checkpoint. An open checkpoint is returned as it is.

    A path is a safetensors or torch file, a directory of them, or the index of one; or one of these
    on the hub, ``hf://org/name[@revision][/path]``, which is downloaded into the hub's cache if it
    is not there yet. A module, a state dict, or a mapping of names to tensors or arrays is read
    directly in memory, and must not be changed meanwhile. ``key`` is the path of the state dict in
    something that holds more, such as ``trainer.model``. Raises CheckpointError, and BudgetError
    for a download that does not fit. The caller closes what it opened.
    """
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if not isinstance(text, str):
            raise UsageError("a checkpoint path must be text, not bytes")
        if is_hub_address(text):
            from ckdiff.checkpoints.places.hub.cached import cached_place

            return _in_files(cached_place(text), key)
        return open_local(text, key=key)
    if isinstance(path, Checkpoint):
        return path
    from ckdiff.checkpoints.places.memory import open_memory

    opened = open_memory(path, key)
    if opened is None:
        raise UsageError(
            "a checkpoint must be a path, a state dict, a module or the result of open_checkpoint, "
            f"not {type(path).__name__}"
        )
    return opened


def open_for_planning(path: Given, *, key: str | None = None) -> Checkpoint:
    """``open_checkpoint``, but of a checkpoint of the hub nothing is fetched except its headers, so
    that only its tensors are known.
    """
    if isinstance(path, (str, os.PathLike)) and is_hub_address(str(os.fspath(path))):
        from ckdiff.checkpoints.places.hub.headers import HubPlace, hub_place

        return _in_files(hub_place(str(os.fspath(path)), HubPlace), key)
    return open_checkpoint(path, key=key)


def open_for_streaming(path: Given, *, key: str | None = None) -> Checkpoint:
    """``open_checkpoint``, but a checkpoint of the hub is not downloaded: its readers fetch what
    they are asked for.
    """
    if isinstance(path, (str, os.PathLike)) and is_hub_address(str(os.fspath(path))):
        from ckdiff.checkpoints.places.hub.headers import hub_place
        from ckdiff.checkpoints.places.hub.streamed import StreamedPlace

        return _in_files(hub_place(str(os.fspath(path)), StreamedPlace), key)
    return open_checkpoint(path, key=key)


def open_local(
    path: str | os.PathLike[str], *, key: str | None = None, of_ours: bool = False
) -> FileCheckpoint:
    """Open the files that a path of this machine means; with ``of_ours`` also what is no checkpoint
    but masks or a delta of ours. Raises CheckpointError.
    """
    return _in_files(local_place(path), key, of_ours=of_ours)


def _in_files(place: Place, key: str | None, *, of_ours: bool = False) -> FileCheckpoint:
    """The checkpoint in the files of ``place``, which is closed where they are none."""
    try:
        opened = FileCheckpoint(place, key)
        if opened.contents.refused is not None and not of_ours:
            raise opened.contents.refused
        if _log.isEnabledFor(logging.DEBUG):
            _say_what(opened)
        return opened
    except BaseException:
        place.close()
        raise


def _say_what(opened: FileCheckpoint) -> None:
    """Log which files a checkpoint is."""
    names = ", ".join(printable(file.name) for file in opened.files[:_NAMED])
    more = f" and {len(opened.files) - _NAMED:,} more" if len(opened.files) > _NAMED else ""
    size = format_size(sum(file.size for file in opened.files))
    tensors = f"{len(opened.table):,} tensors, {size}"
    _log.debug("%s: %s, in %s%s", printable(opened.label), tensors, names, more)


def open_recipe(recipe: str) -> Checkpoint:
    """What a ``Checkpoint.recipe`` of another process says. Raises what opening raises."""
    said = json.loads(recipe)
    if "adapter" in said:
        return _adapted(said["adapter"])
    opening = open_for_streaming if "stream" in said else open_checkpoint
    return opening(_place_of(said), key=said.get("key"))


def place_in(recipe: str) -> str:
    """Where a recipe looks, for people."""
    said = json.loads(recipe)
    return (
        place_in(json.dumps(said["adapter"]["base"]))
        if "adapter" in said
        else (printable(_place_of(said)))
    )


def _adapted(said: dict[str, Any]) -> Checkpoint:
    """What the recipe of a base with an adapter says."""
    from ckdiff.checkpoints.views.adapter import AdapterView

    with ExitStack() as stack:
        base, adapter = (
            stack.enter_context(open_recipe(json.dumps(said[side]))) for side in ("base", "adapter")
        )
        view = AdapterView(base, adapter, said["config"].encode(), safe=said["safe"])
        stack.pop_all()
    return view


def _place_of(said: dict[str, str]) -> str:
    return said.get("stream") or said["path"]


def open_in(
    stack: ExitStack,
    given: Given,
    opening: Callable[[Given], Checkpoint] = open_checkpoint,
) -> Checkpoint:
    """``opening`` a checkpoint, which ``stack`` closes unless it was open before."""
    opened = opening(given)
    if opened is not given:
        stack.callback(opened.close)
    return opened


def adapted(stack: ExitStack, base: Checkpoint, adapter: Given | None) -> Checkpoint:
    """A base with an adapter merged into it, which ``stack`` closes; the base where there is none.

    Raises what opening raises, and CheckpointError for an adapter that is not merged here.
    """
    if adapter is None:
        return base
    from ckdiff.checkpoints.views.adapter import adapt

    return adapt(base, open_in(stack, adapter))


def open_all(stack: ExitStack, *given: Given, key: str | None = None) -> list[Checkpoint]:
    """``open_for_planning`` for several, in ``stack``: see ``fetch_all`` and ``open_sides``."""
    return open_sides(stack, given, open_for_planning, key)


def open_sides(
    stack: ExitStack,
    given: Sequence[Given],
    opening: Callable[..., Checkpoint],
    key: str | None,
) -> list[Checkpoint]:
    """``opening`` several, in ``stack``, with one ``key``, that one of them has to have a use for:
    another's tensors may lie under no key. Raises what opening raises.
    """
    found: list[Checkpoint] = []
    keyless: list[CheckpointError] = []
    for one in given:
        try:
            found.append(open_in(stack, one, partial(opening, key=key)))
        except CheckpointError as error:
            if error.hint != NO_KEY:
                raise
            keyless.append(error)
            found.append(open_in(stack, one, opening))
    unused = sum(any(n.startswith(UNUSED_KEY) for n in opened.notes) for opened in found)
    if keyless and len(keyless) + unused == len(found):
        raise keyless[0]
    return found


def open_keyed(stack: ExitStack, given: Given | None, key: str) -> Checkpoint:
    """``open_for_planning`` of what is given as a base, with the ``key`` that was given with it, in
    ``stack``. Raises UsageError where there is none.
    """
    if given is None:
        raise UsageError(
            "--key chooses a part of the base, but there is no base",
            hint="give the base",
        )
    return open_all(stack, given, key=checked_text("key", key))[0]


def fetch_all(checkpoints: Sequence[Checkpoint]) -> None:
    """Download what is left of checkpoints, before they are read and once all is planned: what is
    refused then, and a download that does not fit the disk, costs no time.

    Raises BudgetError, CheckpointError and SourceChanged.
    """
    _check_room(checkpoints)
    for checkpoint in checkpoints:
        checkpoint.fetch()


def no_room(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Why ``fetch_all`` would refuse a download as things stand, or None."""
    try:
        _check_room(checkpoints)
    except BudgetError as error:
        return error.one_line()
    return None


def _check_room(checkpoints: Sequence[Checkpoint]) -> None:
    lacking = [checkpoint.label for checkpoint in checkpoints if checkpoint.missing_bytes()]
    if not lacking:
        return
    from ckdiff.checkpoints.places.hub.cache import check_room
    from ckdiff.checkpoints.places.hub.settings import Settings

    needed = bytes_to_download(checkpoints)
    check_room(Settings.of_environment().cache, needed, " and ".join(lacking))


def bytes_to_download(checkpoints: Iterable[Checkpoint]) -> int:
    """Bytes that ``fetch_all`` downloads; what two of them share counts once."""
    missing: dict[tuple[str, ...], int] = {}
    for checkpoint in checkpoints:
        missing |= checkpoint.missing_bytes()
    return sum(missing.values())


def recipe_for_workers(given: Given, opened: Checkpoint) -> str:
    """How other processes open ``opened`` as well; see ``open_recipe``.

    Raises UsageError where the caller ``given`` an open checkpoint.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise UsageError(
            "on a cluster each worker opens the checkpoints itself, but one was given open",
            hint='give its path, or scheduler="threads"',
        )
    return opened.recipe()

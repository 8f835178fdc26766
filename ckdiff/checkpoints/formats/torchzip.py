"""Torch files as ``torch.save`` writes them: the tensors of one state dict, where they lie.

``.bin``, ``.pt``, ``.pth``, ``.ckpt``, ``.pth.tar``: they are known by content. TorchScript
archives as well. Nothing in a file is ever called, and nothing of torch is imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckdiff.checkpoints.formats.pickledvalues import Record, children, shown
from ckdiff.checkpoints.formats.statedicts import Found, find, rank
from ckdiff.checkpoints.formats.statelisting import loose_tensors, named_tensors, unnamed_tensors
from ckdiff.checkpoints.formats.statevalues import (
    at_key,
    has_names,
    is_listed,
    is_tensor,
    numpy_arrays,
)
from ckdiff.checkpoints.formats.statewords import is_known, may_be_taken, of_optimizer
from ckdiff.checkpoints.formats.torcharchive import (
    Placed,
    TorchFile,
    is_torch_zip,
    open_torch_zip,
    place,
    plain,
    unsupported,
)
from ckdiff.checkpoints.formats.ziparchive import Read
from ckdiff.checkpoints.pieces import NO_KEY
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.errors import CheckpointError

__all__ = ["TorchTable", "is_torch_zip", "table_of", "torch_table"]

#: bytes that tensors may have beyond what their storages hold: expanded ones repeat elements, and
#: a few bytes could declare more than anybody has
_MOST_REPEATED = 1 << 32
Candidate = tuple[tuple[str, ...], Any]  #: weights, perhaps, and the path that leads to them
_SHOWN = 6  # keys that a message suggests
_LOOKED_AT, _LONGEST_KEY = 1000, 256  # keys that are looked at for one that is alike; letters


@dataclass(slots=True)
class TorchTable:
    """The tensors of one file, in columns; a tensor is known by its position."""

    names: list[str]  #: unique, in the order of the file
    dtypes: list[str]  #: safetensors dtype names
    shapes: list[tuple[int, ...]]
    begins: IntArray  #: byte of the file at which each tensor's first element is
    nbytes: IntArray  #: bytes of each tensor's packed elements
    #: elements from one to the next along each dimension; None where they lie packed, in order
    strides: list[tuple[int, ...] | None]
    absent: list[str]  #: names of tensors that cannot be compared
    key: str  #: the path of the state dict in the file; empty where it is all of it
    notes: list[str]  #: what a user should know, one sentence each


def torch_table(read: Read, size: int, file: str, key: str | None = None) -> TorchTable:
    """The tensors of the torch file of ``size`` bytes that is wherever ``read`` finds it.

    ``read(offset, nbytes)`` gives bytes, fewer only at the end of the file; ``file`` is how
    messages name it. ``key`` is the path of the state dict, ``.`` for all of the file; without it
    the file's weights are found (see statedicts). Raises CheckpointError.
    """
    return table_of(open_torch_zip(read, size, file), key)


def table_of(opened: TorchFile, key: str | None = None) -> TorchTable:
    """``torch_table`` of a file that is open already."""
    where = opened.archive.where
    path, chosen, notes = chosen_weights(where, opened.content, key)
    text = key_text(path, key)
    rows: list[tuple[str, Placed]] = []
    left: list[tuple[str, str]] = []
    for name, value in named_weights(chosen, path, where, text, notes):
        tensor = plain(value)
        reason = unsupported(tensor)
        if reason is None:
            rows.append((name, place(opened, tensor, name)))
        else:
            left.append((name, reason))
    if not rows:
        raise nothing_named(where, text, left)
    if left:
        notes.append(left_out(where, left))
    if arrays := numpy_arrays(chosen):
        notes.append(_arrays_noted(where, arrays))
    check_repeated([placed for _, placed in rows], where)
    return TorchTable(
        [name for name, _ in rows],
        [placed.dtype for _, placed in rows],
        [placed.shape for _, placed in rows],
        np.array([placed.begin for _, placed in rows], np.int64),
        np.array([placed.nbytes for _, placed in rows], np.int64),
        [placed.strides for _, placed in rows],
        [name for name, _ in left],
        text,
        notes,
    )


def left_out(where: str, left: list[tuple[str, str]]) -> str:
    """A note of tensors that cannot be compared, by name, each with the reason."""
    name, reason = left[0]
    first = f"{shown(name)}, {reason}"
    if len(left) == 1:
        return f"{where}: 1 tensor cannot be compared and is left out: {first}"
    return f"{where}: {len(left):,} tensors cannot be compared and are left out, such as {first}"


def _arrays_noted(where: str, names: list[str]) -> str:
    """A note of arrays of numpy, which may be weights, or what somebody wrote down."""
    if len(names) == 1:
        return f"{where}: 1 numpy array in it is not compared: {shown(names[0])}"
    return f"{where}: {len(names):,} numpy arrays in it are not compared, such as {shown(names[0])}"


def key_text(path: tuple[str, ...] | None, key: str | None) -> str:
    """The path of the weights as ``--key`` has it, empty for all of the file."""
    return key if key and key != "." else ".".join(path or ())


def chosen_weights(
    where: str, content: Any, key: str | None, *, trees: bool = False
) -> tuple[tuple[str, ...] | None, Any, list[str]]:
    """The path of the weights in what a file holds, the weights, and notes of the choice.

    The path is None where nothing was chosen. ``where`` is how messages name the file, ``trees``
    as in ``find``. Raises CheckpointError where there are none, or nothing says which.
    """
    if key:
        return None, _asked_for(where, content, key), []
    if is_tensor(content) or is_listed(content):
        return None, content, []
    found = find(content, trees=trees)
    candidates = found.candidates
    if not candidates and len(found.aside) == 1 and may_be_taken(found.aside[0][0]):
        candidates = found.aside
    ordered = sorted(_with_names(candidates), key=lambda candidate: rank(candidate[0]))
    if not ordered:
        raise _no_candidate(where, found)
    path, chosen = ordered[0]
    same = [other for other, _ in ordered if rank(other) == rank(path)]
    if len(same) > 1:
        raise CheckpointError(
            f"{where}: holds {len(same):,} groups of tensors, and nothing says which is the model",
            hint=f"choose with {_keys(same, ' or ')}, or take everything with --key .",
        )
    notes = []
    if path:
        notes.append(f"{where}: the weights under {shown('.'.join(path))} are compared")
    others = [other for other, _ in (*ordered[1:], *candidates, *found.aside) if other != path]
    others = list(dict.fromkeys(others))
    if others:
        notes.append(f"{where}: other tensors in it are left out: {_keys(others, ', ')}")
    if not any(map(is_known, path)):  # else it is said which tensors are weights
        seen = {id(value) for _, value in (*candidates, *found.aside)}
        notes += _loose_noted(where, *loose_tensors(content, seen))
    return path, chosen, notes


def _loose_noted(where: str, count: int, first: str) -> list[str]:
    """A note of tensors that have no name, and are in nothing that has names."""
    if not count:
        return []
    what = "1 tensor in it is" if count == 1 else f"{count:,} tensors in it are"
    at = "at" if count == 1 else "such as at"
    return [f"{where}: {what} not compared, for want of a name: {at} {shown(first)}"]


def _with_names(candidates: list[Candidate]) -> list[Candidate]:
    """Those that have names, or a key that says that they are weights; all where none has."""
    by_name = {id(value): value for _, value in candidates}  # each is looked at once
    with_names = {found for found, value in by_name.items() if has_names(value)}
    named = [one for one in candidates if id(one[1]) in with_names or any(map(is_known, one[0]))]
    return named or candidates


def _asked_for(where: str, content: Any, key: str) -> Any:
    values = at_key(content, key)
    if len(values) > 1:
        raise CheckpointError(f"{where}: --key {shown(key)} can mean more than one thing")
    if values and type(values[0]) not in (str, int, float, bool, bytes, type(None)):
        return values[0]
    what = "is not a mapping of names to tensors" if values else "is not in it"
    raise CheckpointError(
        f"{where}: --key {shown(key)} {what}", hint=_instead(content, key, find(content))
    )


def _alike(labels: Iterable[str], key: str) -> str | None:
    """One of some keys that is like one that leads to nothing, as a hint; or None."""
    import difflib

    short = [label for label in itertools.islice(labels, _LOOKED_AT) if len(label) <= _LONGEST_KEY]
    close = difflib.get_close_matches(key[:_LONGEST_KEY], short, 1, 0.8)
    return f"did you mean --key {shown(close[0], 80)}?" if close else None


def _instead(content: Any, key: str, found: Found) -> str:
    """What to do where a key leads to nothing."""
    if paths := [path for path, _ in (*found.candidates, *found.aside) if path]:
        alike = _alike(map(".".join, paths), key) if len(paths) > 1 else None
        return alike or f"try {_keys(sorted(paths, key=rank), ' or ')}"
    if found.candidates or is_tensor(content) or is_listed(content):
        parts = (label for label, inner in children(content) if type(inner) in (dict, Record))
        return _alike(parts, key) or NO_KEY
    return "it holds no tensors by name under any key"


def _keys(paths: list[tuple[str, ...]], between: str) -> str:
    words = [f"--key {shown('.'.join(path) or '.', 80)}" for path in paths[:_SHOWN]]
    more = [f"{len(paths) - _SHOWN:,} more"] if len(paths) > _SHOWN else []
    return between.join(words + more)


def _no_candidate(where: str, found: Found) -> CheckpointError:
    if found.aside:
        paths = sorted((path for path, _ in found.aside), key=rank)
        return CheckpointError(
            f"{where}: has tensors only under {shown('.'.join(paths[0]))}, and ckdiff compares "
            "that only if you name it",
            hint=f"choose with {_keys(paths, ' or ')}",
        )
    if found.passed:
        if any(not path or "optim" in path.lower() for path in found.passed):
            what = "holds the state of an optimizer, and no weights"
        else:
            what = f"has no weights, only {shown(found.passed[0])} and other settings or state"
        return CheckpointError(f"{where}: {what}", hint="give the file that has the weights")
    return CheckpointError(
        f"{where}: holds no tensors by name",
        hint="save a state dict: torch.save(model.state_dict(), FILE)",
    )


def nothing_named(where: str, path: str, left: list[tuple[str, str]]) -> CheckpointError:
    """The error where no tensor is left to compare; ``left`` were left out, with the reason."""
    if not left:
        if path:
            under, hint = f" under --key {shown(path)}", "leave out --key to see what is in it"
        else:
            under, hint = " that are weights", "give the file that has the model's weights"
        return CheckpointError(f"{where}: has no tensors{under}", hint=hint)
    name, reason = left[0]
    sharded = "DTensor" in reason
    return CheckpointError(
        f"{where}: none of its {len(left):,} tensors can be compared: {shown(name)} is {reason}",
        hint="give the directory that has the files of all ranks" if sharded else (
            "save them as plain tensors, of dtypes that safetensors has"
        ),
    )  # fmt: skip


def named_weights(
    chosen: Any, path: tuple[str, ...] | None, where: str, text: str, notes: list[str]
) -> list[tuple[str, Any]]:
    """The tensors of the weights by name, in order; names are unique. Raises CheckpointError.

    What an optimizer keeps is none of them, also where it was saved flat, among the weights. One of
    ``notes`` is made of tensors that have no names.
    """
    try:
        named = named_tensors(chosen, path)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: the tensors under {shown(text or '.')} cannot be listed: {error}",
            hint="choose a part of the file with --key",
        ) from None
    _check_names(named, where)
    notes += _loose_noted(where, *unnamed_tensors(chosen, named, path)) if named else []
    passed = of_optimizer([name for name, _ in named])
    asked = path is None and len(passed) == len(named)  # a key leads to nothing else
    return named if not passed or asked else [one for one in named if one[0] not in passed]


def _check_names(named: list[tuple[str, Any]], where: str) -> None:
    seen = set[str]()
    for name, _ in named:
        if name in seen:
            raise CheckpointError(
                f"{where}: two tensors have the name {shown(name)}",
                hint="choose a part of the file with --key",
            )
        seen.add(name)
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError:
                raise CheckpointError(
                    f"{where}: a tensor has a name that is not valid text: {shown(name)}",
                    hint="rename it and save it again",
                ) from None


def check_repeated(placed: list[Placed], where: str) -> None:
    """Refuse tensors that repeat elements until they are more than anybody has."""
    repeated = 0
    for one in placed:
        if one.strides is not None:
            repeated += max(0, one.nbytes - _reach(one))
    if repeated > _MOST_REPEATED:
        raise CheckpointError(
            f"{where}: its tensors repeat {repeated:,} bytes that are not in the file",
            hint="load it with torch, and save tensor.contiguous() of each",
        )


def _reach(one: Placed) -> int:
    """Bytes from the first to the last element of a tensor that is not empty."""
    assert one.strides is not None
    elements = 1
    for n in one.shape:
        elements *= n
    steps = sum((n - 1) * stride for n, stride in zip(one.shape, one.strides, strict=True))
    return (steps + 1) * (one.nbytes // elements)

"""Copies of weights that later looks are held against: of what they are, or of a checkpoint."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Literal, get_args

import numpy as np
import torch

from ckdiff.checkpoints.opening import Given, fetch_all, open_all
from ckdiff.checkpoints.protocol import Checkpoint, SpanReader
from ckdiff.dtypes import DTYPES
from ckdiff.errors import PairingError, UsageError, printable
from ckdiff.kernels.casting import narrow
from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.rules import Rule
from ckdiff.stores.matching import several
from ckdiff.training.names import plain_name
from ckdiff.training.sharding import held_ranges
from ckdiff.training.watching import Watched

Keep = Literal["device", "cpu"]
_AT_ONCE = 1 << 22  # elements of a checkpoint that are read together


def checked_keep(value: object) -> Keep:
    """``value`` if it says where copies are kept; raises UsageError."""
    for known in get_args(Keep):
        if value == known:
            found: Keep = known
            return found
    raise UsageError(
        f"keep cannot be {printable(repr(value))[:60]}", hint=f"one of {', '.join(get_args(Keep))}"
    )


class Copies:
    """One copy of each watched tensor, by name; of sharded ones the part that is here."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._copies: dict[str, torch.Tensor] = {}
        self._kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    @property
    def names(self) -> Collection[str]:
        """What there are copies of."""
        return self._copies.keys()

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    def room(self, tensor: Watched) -> torch.Tensor:
        """An uninitialised copy of a tensor, which is its copy from now on."""
        here = tensor.here
        host = self._keep == "cpu"
        self._copies[tensor.name] = torch.empty(
            tuple(here.shape),
            dtype=here.dtype,
            device="cpu" if host else here.device,
            pin_memory=host and here.device.type == "cuda",
        )
        self._kinds[tensor.name] = tensor.kind
        return self._copies[tensor.name]

    def take(self, tensors: Sequence[Watched]) -> None:
        """Copy what tensors are now."""
        with torch.no_grad():
            for tensor in tensors:
                self.room(tensor).copy_(tensor.here, non_blocking=True)

    def renew(self, tensors: Sequence[Watched]) -> None:
        """Make the copies of tensors what they are now, in their place."""
        with torch.no_grad():
            for tensor in tensors:
                self._copies[tensor.name].copy_(tensor.here)

    def of(self, tensor: Watched) -> torch.Tensor | None:
        """The copy of a tensor, on its device unless it is kept elsewhere; None where there is none
        of this shape and dtype. Raises UsageError where another part of it is here than was then.
        """
        copy = self._copies.get(tensor.name)
        if copy is None or self._kinds[tensor.name] != tensor.kind:
            return None
        if copy.shape != tensor.here.shape:
            raise UsageError(
                f"{printable(tensor.name)}: this process holds {list(tensor.here.shape)} of it and"
                f" held {list(copy.shape)}",
                hint="make the monitor once the model is sharded",
            )
        if self._keep == "device" and copy.device != tensor.here.device:  # the model was moved
            copy = self._copies[tensor.name] = copy.to(tensor.here.device)
        return copy


def load(copies: Copies, tensors: Sequence[Watched], base: Given, rule: Rule) -> None:
    """Make copies of what a checkpoint has in the place of tensors, in their dtypes.

    Values are widened where the tensor's dtype holds them, and rounded where ``rule`` rounds to
    it. Of sharded tensors only rows that are here are read. Raises what opening raises, and
    PairingError where it has not all of them, in shapes and dtypes that fit.
    """
    with ExitStack() as stack:
        (source,) = open_all(stack, base)
        found = _matched(source, tensors)
        for tensor, at in zip(tensors, found, strict=True):
            _check(tensor, source, at, rule)
        fetch_all([source])
        reader = stack.enter_context(closing(source.reader()))
        with torch.no_grad():
            for tensor, at in zip(tensors, found, strict=True):
                _fill(copies.room(tensor), tensor, source, at, reader)
        source.verify()


def _matched(source: Checkpoint, tensors: Sequence[Watched]) -> list[int]:
    """Where in the table of a checkpoint each tensor is: by its name, else without prefixes."""
    exact = {name: i for i, name in enumerate(source.table.names)}
    plain: dict[str, list[int]] = defaultdict(list)
    for name, i in exact.items():
        plain[plain_name(name)].append(i)
    claims = Counter(name for tensor in tensors for name in {*map(plain_name, tensor.names)})
    found, missing = [], []
    for tensor in tensors:
        named = [exact[name] for name in tensor.names if name in exact][:1]
        if not named:  # a guess between two could be the wrong one
            some = {*map(plain_name, tensor.names)}
            named = [i for name in some if claims[name] == 1 for i in plain.get(name, ())]
        if len(named) == 1:
            found += named
        else:
            missing.append(tensor.name)
    if missing:
        raise PairingError(
            f"{printable(source.label)} lacks what is watched of the model: {several(missing)}",
            hint="leave base out to compare with the weights as they are now, or give a state dict"
            " with the model's own names",
        )
    return found


def _check(tensor: Watched, source: Checkpoint, at: int, rule: Rule) -> None:
    table = source.table
    if table.shapes[at] != tuple(tensor.whole.shape):  # those of packed elements never are equal
        raise PairingError(
            f"{printable(tensor.name)} is {list(tensor.whole.shape)} in the model and"
            f" {list(table.shapes[at])} in {printable(source.label)}"
        )
    given, wanted = DTYPES[table.dtypes[at]], DTYPES[tensor.held.dtype]
    if given == wanted or wanted.holds(given) or rule.rounds(given) == wanted:
        return
    target = {"BF16": "bf16", "F16": "f16", "F32": "f32"}.get(wanted.name)
    rounds = target is not None and Rule("exact", target=target).rounds(given) is not None
    where = f"{given.name} in {printable(source.label)} and {wanted.name} in the model"
    raise PairingError(
        f"{printable(tensor.name)} is {where}",
        hint=f'rule="exact@{target}" compares it with what that is rounded to'
        if rounds
        else "give a base in the model's dtype",
    )


def _fill(
    copy: torch.Tensor, tensor: Watched, source: Checkpoint, at: int, reader: SpanReader
) -> None:
    """Read a tensor of a checkpoint, or the part that is here, into a copy."""
    shape = source.table.shapes[at]
    window = _Window(source, at, tensor.held.dtype, reader)
    if tuple(copy.shape) == shape:
        flat = copy.reshape(-1)
        for start, stop in _steps(0, math.prod(shape), _AT_ONCE):
            flat[start:stop].copy_(window.read(start, stop, copy.dtype))
        return
    rows, *others = held_ranges(tensor.whole, tuple(copy.shape))
    if not copy.numel():
        return
    inside = [slice(part.start, part.stop) for part in others]
    row = math.prod(shape[1:])
    for start, stop in _steps(rows.start, rows.stop, max(1, _AT_ONCE // row)):
        block = window.read(start * row, stop * row, copy.dtype).view(stop - start, *shape[1:])
        copy[start - rows.start : stop - rows.start].copy_(block[(slice(None), *inside)])


def _steps(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for at in range(start, stop, step):
        yield at, min(at + step, stop)


class _Window:
    """Ranges of one tensor of a checkpoint as tensors of another dtype."""

    def __init__(self, source: Checkpoint, at: int, dtype: str, reader: SpanReader) -> None:
        self._given, self._wanted = source.table.dtypes[at], dtype
        self._tensors, self._reader = np.array([at], np.int64), reader

    def read(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """The elements [start, stop), flat; they have whole bytes."""
        given, wanted = (DTYPES[name].bits // 8 for name in (self._given, self._wanted))
        size = (stop - start) * given
        spans = np.array([start * given], np.int64), np.array([size], np.int64)
        (place,) = self._reader.acquire(self._tensors, *spans).tolist()
        source = bytes_at(place, size)
        out: Bytes = np.empty((stop - start) * wanted, np.uint8)
        if self._given == self._wanted:
            out[:] = source
        else:
            narrow(source, self._given, self._wanted, out)
        self._reader.release()
        return torch.from_numpy(out).view(dtype)

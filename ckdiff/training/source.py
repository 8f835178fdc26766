"""Where masks for training come from: a mask store, its path, or a dict of bool tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from ckdiff.errors import UsageError
from ckdiff.options import checked_text
from ckdiff.rules import Rule
from ckdiff.stores.maskstore import MaskStore, open_store

#: what the functions of this package take as a store
Masks: TypeAlias = MaskStore | str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a flat mask."""

    name: str
    start: int
    stop: int


class Source(Protocol):
    """Masks by tensor name."""

    shapes: dict[str, tuple[int, ...]]

    def mask(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A range of the flat mask of a tensor, True where it is trained: bool, 1-dimensional."""
        ...


class _Stored:
    """The masks of a store; each is read when it is asked for."""

    def __init__(self, store: MaskStore, rule: str | Rule | None) -> None:
        self._store = store
        self._rule = rule
        self.shapes = dict(zip(store.table.names, store.table.shapes, strict=True))
        if store.table.names:  # an unknown rule is said before anything is set up
            store.mask(store.table.names[0], rule, start=0, stop=0)

    def mask(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self._store.mask(name, self._rule, start=start, stop=stop))


class _Given:
    """Masks that the caller has."""

    def __init__(self, masks: Mapping[str, Any]) -> None:
        self._masks = {
            checked_text("the name of a mask", name): _checked(name, mask)
            for name, mask in masks.items()
        }
        self.shapes = {name: tuple(mask.shape) for name, mask in self._masks.items()}

    def mask(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._masks[name].reshape(-1)[start:stop]


def _checked(name: str, mask: Any) -> torch.Tensor:
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        return torch.tensor(mask)
    if hasattr(mask, "device_mesh"):
        raise UsageError(
            f"the mask of {name!r} is a sharded tensor (DTensor)",
            hint="give each process the whole mask; it keeps the part it needs",
        )
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and not mask.is_sparse:
        return mask.detach()
    kind = f"{mask.dtype} " if isinstance(mask, (np.ndarray, torch.Tensor)) else ""
    raise UsageError(
        f"the mask of {name!r} must be a bool tensor, not {kind}{type(mask).__name__}",
        hint="True where the element is trained",
    )


def joined(source: Source, pieces: list[Piece], start: int, stop: int) -> torch.Tensor:
    """A range of the flat mask that the pieces make, one after the other."""
    parts = []
    at = 0
    for piece in pieces:
        size = piece.stop - piece.start
        low, high = max(start - at, 0), min(stop - at, size)
        if low < high:
            parts.append(source.mask(piece.name, piece.start + low, piece.start + high))
        at += size
    return parts[0] if len(parts) == 1 else torch.cat(parts or [torch.empty(0, dtype=torch.bool)])


def whole(source: Source, name: str) -> torch.Tensor:
    """The flat mask of a tensor."""
    return source.mask(name, 0, math.prod(source.shapes[name]))


def open_masks(store: Masks, rule: str | Rule | None) -> Source:
    """The masks that ``store`` stands for; raises UsageError, StoreError."""
    if isinstance(store, Mapping):
        if rule is not None:
            raise UsageError("masks given as a dict have no rules", hint="leave rule= out")
        return _Given(store)
    return _Stored(open_store(store), rule)

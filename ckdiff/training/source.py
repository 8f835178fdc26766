"""Where masks for training come from: a mask store, its path, or a dict of bool tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from ckdiff.errors import UsageError
from ckdiff.options import checked_text
from ckdiff.rules import Rule
from ckdiff.store import MaskStore, open_store

#: what the functions of this package take as a store
Masks: TypeAlias = MaskStore | str | os.PathLike[str] | Mapping[str, Any]


class Source(Protocol):
    """Masks by tensor name."""

    shapes: dict[str, tuple[int, ...]]

    def mask(self, name: str) -> torch.Tensor:
        """The mask of a tensor, True where it is trained: bool, with the tensor's shape."""
        ...


class _Stored:
    """The masks of a store; each is read when it is asked for."""

    def __init__(self, store: MaskStore, rule: str | Rule | None) -> None:
        self._store = store
        self._rule = rule
        self.shapes = dict(zip(store.table.names, store.table.shapes, strict=True))
        if store.table.names:  # an unknown rule is said before anything is set up
            store.mask(store.table.names[0], rule, start=0, stop=0)

    def mask(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._store.mask(name, self._rule))


class _Given:
    """Masks that the caller has."""

    def __init__(self, masks: Mapping[str, Any]) -> None:
        self._masks = {
            checked_text("the name of a mask", name): _checked(name, mask)
            for name, mask in masks.items()
        }
        self.shapes = {name: tuple(mask.shape) for name, mask in self._masks.items()}

    def mask(self, name: str) -> torch.Tensor:
        return self._masks[name]


def _checked(name: str, mask: Any) -> torch.Tensor:
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        return torch.tensor(mask)
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and not mask.is_sparse:
        return mask.detach()
    kind = f"{mask.dtype} " if isinstance(mask, (np.ndarray, torch.Tensor)) else ""
    raise UsageError(
        f"the mask of {name!r} must be a bool tensor, not {kind}{type(mask).__name__}",
        hint="True where the element is trained",
    )


def open_masks(store: Masks, rule: str | Rule | None) -> Source:
    """The masks that ``store`` stands for; raises UsageError, StoreError."""
    if isinstance(store, Mapping):
        if rule is not None:
            raise UsageError("masks given as a dict have no rules", hint="leave rule= out")
        return _Given(store)
    return _Stored(open_store(store), rule)

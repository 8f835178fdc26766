"""A mask file as a list of tensors with their bits, whatever the format. Nothing is trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError, printable
from ckdiff.exports.masks import CHANGED, FORMAT, FROZEN
from ckdiff.exports.tensorfile import INDICES

#: what the items of a tensor are: bytes of 0 or 1, eight elements in a byte, positions of ones
Kind = Literal["flags", "packed", "indices"]
Shape = tuple[int, ...]

PIECE = 1 << 20  #: items that are read at a time
METADATA_LIMIT = 100_000_000  #: bytes of metadata that are read
_MOST = 1 << 60  # elements of a tensor


@dataclass(slots=True)
class Item:
    """One tensor of a mask file."""

    name: str  #: of the model's tensor
    kind: Kind
    shape: Shape  #: of what is stored
    read: Callable[[], Iterator[npt.NDArray[Any]]]  #: the items in order, in pieces

    @property
    def length(self) -> int:
        """How many items there are."""
        return math.prod(self.shape)


@dataclass(slots=True)
class MaskFile:
    """What is known of a mask file before its bits are read."""

    format: str  #: safetensors, npz or torch
    items: list[Item]
    files: list[dict[str, str]]  #: provenance: ``label`` and ``digest`` of each
    polarity: str | None  #: where the file says it
    rule: str | None
    tensors: dict[str, tuple[str, Shape]]  #: dtype and shape of the model's tensors, if it says so


@dataclass(slots=True)
class Notes:
    """What the metadata of a file by ``ckdiff export`` says; nothing for other files."""

    encoding: str | None = None
    polarity: str | None = None
    rule: str | None = None
    tensors: str = "{}"

    @classmethod
    def of(cls, metadata: Any) -> Notes:
        """Read metadata; what is not ours is ignored."""
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            return cls()
        texts = {k: v for k, v in metadata.items() if isinstance(v, str)}
        return cls(
            texts.get("encoding"),
            texts.get("polarity"),
            texts.get("rule"),
            texts.get("tensors", "{}"),
        )

    def described(self, where: str) -> dict[str, tuple[str, Shape]]:
        """The model's tensors; raises CheckpointError."""
        try:
            data = json.loads(self.tensors)
            found = {name: (str(dtype), tuple(shape)) for name, (dtype, shape) in data.items()}
        except (AttributeError, RecursionError, TypeError, ValueError):
            raise _nonsense(where, "tensors") from None
        for dtype, shape in found.values():
            if dtype not in DTYPES or not is_shape(shape):
                raise _nonsense(where, "tensors")
        return found

    def checked(self, where: str) -> Notes:
        """Itself; raises CheckpointError for a polarity that is none."""
        if self.polarity not in (None, CHANGED, FROZEN):
            raise _nonsense(where, "polarity")
        return self


def is_shape(shape: tuple[Any, ...]) -> bool:
    """Whether these are dimensions of a tensor that could exist."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
    return whole and len(shape) <= 64 and math.prod(max(n, 1) for n in shape) <= _MOST


def make_item(
    where: str,
    name: str,
    dtype: np.dtype[Any] | None,
    shape: Shape,
    read: Callable[[], Iterator[npt.NDArray[Any]]],
    encoding: str | None,
) -> Item:
    """What a stored tensor is, by its name, its dtype and what the file says; CheckpointError."""
    if dtype is not None and dtype.kind in "iu" and dtype.itemsize >= 2:
        if name.endswith(INDICES) and len(shape) == 1:
            return Item(name.removesuffix(INDICES), "indices", shape, read)
    elif dtype is not None and dtype.kind in "biu":
        if encoding == "packed":
            return Item(name, "packed", shape, read)
        return Item(name, "flags", shape, read)
    what = "no such type" if dtype is None else str(dtype)
    raise CheckpointError(
        f"{where}: {printable(name)} is no mask: {what}",
        hint=f"masks are bool or uint8 of 0 and 1, or whole numbers called NAME{INDICES}",
    )


def _nonsense(where: str, key: str) -> CheckpointError:
    return CheckpointError(f"{where}: its metadata makes no sense: {key}")

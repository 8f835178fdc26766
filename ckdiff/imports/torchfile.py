"""Masks that torch saved: loaded with ``weights_only``, so that nothing in them is ever run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.errors import CheckpointError, printable
from ckdiff.exports.torchfile import load_torch
from ckdiff.imports.maskfile import PIECE, MaskFile, Notes, make_item
from ckdiff.writing.objects import file_digest


def read_torch(path: str) -> MaskFile:
    """The masks at ``path``, mapped and not read. Raises CheckpointError."""
    torch = load_torch()
    where = printable(path)
    try:
        digest = file_digest(Path(path))
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a hostile file makes torch raise
        reason = printable(str(error).strip().split("\n")[0][:200] or type(error).__name__)
        raise CheckpointError(
            f"{where}: torch cannot load it: {reason}",
            hint="only files of tensors, saved by torch 1.6 or later, are read",
        ) from None
    notes = Notes()
    if isinstance(content, dict) and isinstance(content.get("masks"), dict):
        notes = Notes.of(content.get("metadata")).checked(where)
        content = content["masks"]
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{where}: holds no masks by name", hint='save {"masks": {name: bool tensor}}'
        )
    items = []
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{where}: {printable(str(name)[:80])} is no tensor with a name")
        array = _array(tensor, f"{where}: {printable(name)}")
        items.append(
            make_item(where, name, array.dtype, tuple(tensor.shape), _Reader(array), notes.encoding)
        )
    described = notes.described(where)
    files = [{"label": Path(path).name, "digest": digest}]
    return MaskFile("torch", items, files, notes.polarity, notes.rule, described)


def _array(tensor: Any, where: str) -> npt.NDArray[Any]:
    """Its elements in order, flat."""
    try:
        if not tensor.is_contiguous():
            # a tensor that repeats one element could be larger than any memory
            if tensor.nbytes > tensor.untyped_storage().nbytes():
                raise CheckpointError(f"{where} says more elements than it holds")
            tensor = tensor.contiguous()
        array: npt.NDArray[Any] = tensor.detach().reshape(-1).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, meta, bfloat16
        reason = printable(str(error).split("\n")[0][:200])
        raise CheckpointError(f"{where} is no mask: {reason}") from None
    return array.view(np.uint8) if array.dtype == np.bool_ else array


class _Reader:
    """Hands out one tensor."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array

    def __call__(self) -> Iterator[npt.NDArray[Any]]:
        for at in range(0, len(self._array), PIECE):
            yield self._array[at : at + PIECE]

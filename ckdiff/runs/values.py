"""Elements of checkpoints as float32, whatever their dtype: what is computed with, not compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CkdiffError
from ckdiff.kernels.casting import widen
from ckdiff.kernels.memory import Bytes, views

Floats = npt.NDArray[np.float32]

_WHOLE = {"int": "i", "uint": "u"}


def has_numbers(dtype: str) -> bool:
    """Whether elements of a dtype are numbers; bools, complex and sub-byte ones are none here."""
    return DTYPES[dtype].numeric


def to_float32(data: Bytes, dtype: str, out: Floats) -> None:
    """Write the elements in ``data`` to ``out``, rounded to nearest where they have to be.

    What float32 has no number for becomes an infinity, as rounding says. Elements of a dtype
    must be numbers.
    """
    form = DTYPES[dtype]
    if dtype == "F32" or (form.kind == "float" and dtype != "F64"):
        widen(data, dtype, "F32", out.view(np.uint8))
        return
    if not form.numeric:
        raise CkdiffError(f"{dtype} has no numbers", hint="please report it")
    kind: Any = np.dtype(f"<{_WHOLE.get(form.kind, 'f')}{form.bits // 8}")
    with np.errstate(over="ignore"):
        out[:] = data.view(kind)


class FloatReader:
    """Reads elements of a checkpoint's tensors as float32. For one thread; to be closed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._table = checkpoint.table
        self._reader = checkpoint.reader()

    def read(self, tensor: int, start: int, out: Floats) -> Bytes:
        """Fill ``out`` with the elements of a tensor from ``start`` on; gives their own bytes.

        Those may be read until ``release``. Raises CheckpointError and SourceChanged.
        """
        dtype = self._table.dtypes[tensor]
        bits = DTYPES[dtype].bits
        nbytes = np.array([len(out) * bits // 8], np.int64)
        begin = np.array([start * bits // 8], np.int64)
        addresses = self._reader.acquire(np.array([tensor], np.int64), begin, nbytes)
        data = views(addresses, nbytes)[0]
        to_float32(data, dtype, out)
        return data

    def release(self) -> None:
        """End of the window. Raises SourceChanged where the bytes were not the source's."""
        self._reader.release()

    def close(self) -> None:
        """Let go of what is held."""
        self._reader.close()

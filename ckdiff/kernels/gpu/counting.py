"""How many elements changed between tensors that are on a device: one launch for each dtype.

The work is put where the caller's own is, on the current stream of the tensors' device: a GPU's,
with Triton, or torch's CPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ckdiff.dtypes import DTYPES, DType
from ckdiff.errors import UsageError
from ckdiff.kernels import Kernels
from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.preparing import Slot, make_slots
from ckdiff.kernels.gpu.tables import MOST, Int64, Table, sent
from ckdiff.rules import EXACT, Rule

__all__ = ["check", "count_changed", "current", "slot_for"]

Tensor = torch.Tensor

_ROWS = 1 << 14  # of a table: what a launch is told is small beside what it reads


def count_changed(
    pairs: Sequence[tuple[Tensor, Tensor]],
    dtypes: Sequence[str],
    rules: Sequence[Rule] = (EXACT,),
) -> Tensor:
    """int64 (pairs, rules), on the device: how many elements of each pair changed.

    The tensors of all pairs are contiguous and on one device, those of a pair of one size.
    ``dtypes`` are their names in safetensors, one a pair. On a GPU nothing waits for the device,
    and besides the result a number is written for 4,096 elements. Raises UsageError, also for
    other devices, and CkdiffError where the device's code cannot be trusted.
    """
    for (base, tuned), name in zip(pairs, dtypes, strict=True):
        check(base, tuned, DTYPES[name])
    where = pairs[0][0].device if pairs else torch.device("cpu")
    if any(base.device != where for base, _ in pairs):
        raise UsageError(
            "the pairs are on several devices", hint="count those of each by themselves"
        )
    out = torch.zeros((len(pairs), len(rules)), dtype=torch.int64, device=where)
    every = tuple(dict.fromkeys((EXACT, *rules)))
    columns = [every.index(rule) for rule in rules]
    with current(where):
        for name in dict.fromkeys(dtypes):
            slot = slot_for(name, every, where)
            some = [i for i, one in enumerate(dtypes) if one == name]
            for table, owners in _tables([(i, *pairs[i]) for i in some], DTYPES[name]):
                counts = torch.empty((len(every), table.programs), dtype=torch.int32, device=where)
                slot.compare(table.sent(where), None, counts)
                # sums of rows are differences of running sums: to add at one place is slow there
                whose, last = sent(owners, where), sent(table.lasts, where)
                until = counts.cumsum(1, dtype=torch.int64)[:, last]
                rows = until.diff(prepend=until.new_zeros(len(every), 1))
                out.index_add_(0, whose, rows[columns].T)
    return out


def check(base: Tensor, tuned: Tensor, dtype: DType) -> None:
    """Raise UsageError where two tensors cannot be compared where they are."""
    if base.device != tuned.device:
        wrong = f"one is on {base.device}, the other on {tuned.device}"
    elif base.nbytes != tuned.nbytes or base.dtype != tuned.dtype:
        wrong = f"one is {base.dtype} of {base.nbytes:,} bytes, the other {tuned.dtype} of "
        wrong += f"{tuned.nbytes:,}"
    elif not (base.is_contiguous() and tuned.is_contiguous()):
        wrong = "they do not lie in one piece"
    elif dtype.bits >= 8 and base.element_size() * 8 != dtype.bits:
        wrong = f"{base.dtype} is not {dtype.name}"
    else:
        return
    raise UsageError(f"tensors cannot be compared on their device: {wrong}",
                     hint="give contiguous tensors of one dtype and device")  # fmt: skip


@lru_cache(64)
def slot_for(dtype: str, rules: tuple[Rule, ...], where: torch.device) -> Slot:
    """What compares elements of a dtype on a device, whose code is made and tried once.

    Raises UsageError and CkdiffError as ``count_changed`` does.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if where.type not in ("cuda", "cpu") or (where.type == "cuda" and not has_triton):
        raise UsageError(f"tensors on {where.type} are compared there by Triton, which is missing",
                         hint="compare copies on the CPU")  # fmt: skip
    of = [DTYPES[dtype]]
    return make_slots(Kernels(of, rules), of, rules, Device(where, str(where)), hashing=False)[0]


def current(where: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to this device inside the ``with``."""
    return torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext()


def _tables(
    pairs: Sequence[tuple[int, Tensor, Tensor]], of: DType
) -> Iterator[tuple[Table, Int64]]:
    """Tables of all elements of some pairs, and whose each row is."""
    rows = [
        (
            base.data_ptr() + first * of.bits // 8,
            tuned.data_ptr() + first * of.bits // 8,
            min(MOST, tuned.nbytes * 8 // of.bits - first),
            0,
            i,
        )
        for i, base, tuned in pairs
        for first in range(0, tuned.nbytes * 8 // of.bits, MOST)
    ]
    for start in range(0, len(rows), _ROWS):
        numbers = np.array(rows[start : start + _ROWS], np.int64)
        yield Table.of(*numbers.T[:4]), numbers[:, 4].copy()

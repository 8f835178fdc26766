"""Which elements changed between two tensors on a device, and what they are now.

Both sides are read once, and what comes out is as large as what changed: a comparison writes a mask
and counts, their running sum says where each program's changes go, and the mask's ones are moved
together. ``torch.nonzero`` and a gather do the same in many passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ckdiff.dtypes import DTYPES
from ckdiff.errors import UsageError
from ckdiff.kernels.gpu.counting import check, current, slot_for
from ckdiff.kernels.gpu.preparing import Slot
from ckdiff.kernels.gpu.tables import MOST, RAW, Table
from ckdiff.kernels.hashing import UNIT
from ckdiff.rules import EXACT, Rule

__all__ = ["Changed", "changed_positions"]

Tensor = torch.Tensor


class Changed(NamedTuple):
    """The elements of a tensor that changed; both of these are on its device."""

    positions: Tensor  #: int64 (n,), in the order of memory, increasing
    values: Tensor  #: (n,), of the tensor's dtype: what is there now


def changed_positions(
    base: Tensor, tuned: Tensor, dtype: str, *, rule: Rule = EXACT, most: int | None = None
) -> Changed | None:
    """The elements of ``tuned`` that changed under a rule; None where they are more than ``most``.

    Both are contiguous, on one device, of one size and one torch dtype; ``dtype`` is its name in
    safetensors, of 8 bits or more. Besides what it gives, it takes a quarter of a byte for an
    element, of at most 2**28 at a time. Waits for the device. Raises UsageError, and CkdiffError
    where the device's code cannot be trusted.
    """
    of = DTYPES[dtype]
    check(base, tuned, of)
    if of.bits < 8:
        raise UsageError(
            f"elements of {dtype} have no values of their own", hint="give bytes, as U8"
        )
    rules = tuple(dict.fromkeys((EXACT, rule)))
    raw = tuned.detach().reshape(-1).view(RAW[of.bits])
    left = raw.numel() if most is None else most
    parts = []
    with current(tuned.device):
        slot = slot_for(dtype, rules, tuned.device)
        for first in range(0, raw.numel(), MOST):
            part = _part(slot, base, raw, first, left)
            if part is None:
                return None
            left -= len(part.positions)
            parts.append(part)
        parts = parts or [Changed(raw.new_empty(0, dtype=torch.int64), raw[:0])]
        columns = zip(*parts, strict=True)
        positions, values = (torch.cat(some) if len(some) > 1 else some[0] for some in columns)
    return Changed(positions, values.view(tuned.dtype))


def _part(slot: Slot, base: Tensor, raw: Tensor, first: int, most: int) -> Changed | None:
    """The changes from an element on, MOST at a time; values as integers."""
    elements, at = min(MOST, raw.numel() - first), first * raw.element_size()
    table = Table.one(base.data_ptr() + at, raw.data_ptr() + at, elements, raw.device)
    rules = sum(code.rules for code in slot.code)
    masks = torch.empty((rules, -(-elements // UNIT) * 64), dtype=torch.uint8, device=raw.device)
    counts = torch.empty((rules, table.programs), dtype=torch.int32, device=raw.device)
    slot.compare(table, masks, counts)
    ends = counts[-1].cumsum(0, dtype=torch.int64)
    total = int(ends[-1])
    if total > most:
        return None
    found = torch.empty(total, dtype=torch.int64, device=raw.device), raw.new_empty(total)
    slot.code[-1].move(table, masks[-1], ends, found)
    return Changed(found[0].add_(first), found[1])

"""What is made once for each dtype: tables of 8-bit pairs, and the code that does all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ckdiff.dtypes import DType
from ckdiff.errors import CkdiffError
from ckdiff.kernels import Kernels, Results
from ckdiff.kernels.binding import bind
from ckdiff.kernels.gpu.device import HINT, Device, out_of_memory
from ckdiff.kernels.gpu.digests import tails
from ckdiff.kernels.gpu.tables import AT, BASE, COLUMNS, ELEMENTS, FIRST, TUNED, UNIT_OF, Table
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.memory import bytes_at
from ckdiff.rules import Rule

if TYPE_CHECKING:
    from ckdiff.kernels.gpu.fused import Fused

__all__ = ["Slot", "make_slots"]

Bytes = npt.NDArray[np.uint8]
Tensor = torch.Tensor

_PAIRS = 1 << 16  # of 8-bit elements; a pair's number is ``base * 256 + tuned``
_HERE = torch.device("cpu")
_TRIED = (1 << 14) + 100  # elements: several of a launch's programs, and a ragged end


@dataclass(slots=True, eq=False)
class Slot:
    """What is done with the elements of one dtype."""

    dtype: DType
    code: Sequence[Fused | Plain]  #: all rules, one after the other; the first is exact

    def compare(
        self, table: Table, masks: Tensor | None, counts: Tensor, sums: Tensor | None = None
    ) -> None:
        """All rules, and digests: one launch, or more where there are very many rules."""
        first = 0
        for code in self.code:
            part = slice(first, first := first + code.rules)
            code(table, None if masks is None else masks[part], counts[part], sums)
            sums = None


def make_slots(
    cpu: Kernels, dtypes: Sequence[DType], rules: Sequence[Rule], device: Device, *, hashing: bool
) -> list[Slot]:
    """One a dtype; tried with digests where it is for ``hashing``. Raises CkdiffError where the
    device's code fails or is wrong, and what torch raises where memory runs out.

    Compiling needs a compiler, a folder to write to, and a device that Triton knows. Nor is code
    trusted that nobody has seen run on this device: it is held against the CPU's on some elements.
    """
    slots = []
    for i, dtype in enumerate(dtypes):
        try:
            with device.lock, device.on(device.comparing):
                plain = Slot(dtype, [Plain(cpu, i, dtype, len(rules))])
                slot = _fused(plain, rules, device) if device.fused else plain
                wrong = _wrong(slot, plain, device, hashing=hashing)
        except Exception as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise CkdiffError(f"{device.name} cannot be used: {reason}", hint=HINT) from error
        if wrong:
            said = f"its {wrong} of {dtype.name} are other ones than the CPU's"
            raise CkdiffError(f"{device.name} cannot be used: {said}", hint=HINT)
        slots.append(slot)
    return slots


def _fused(plain: Slot, rules: Sequence[Rule], device: Device) -> Slot:
    from ckdiff.kernels.gpu.fused import MOST_RULES, Fused, needs_table

    dtype, pairs = plain.dtype, None
    bounds = [bind(rule, dtype) for rule in rules]
    if any(needs_table(bound, dtype) for bound in bounds):
        every = np.arange(_PAIRS, dtype=np.uint16)
        sides = (every >> 8).astype(np.uint8), every.astype(np.uint8)
        lines = _found(plain, sides, _HERE, hashing=False)[0]
        pairs = np.unpackbits(lines, axis=-1, bitorder="little").astype(np.int64)
    code = []
    for first in range(0, len(bounds), MOST_RULES):
        some = bounds[first : first + MOST_RULES]
        table: Tensor | None = None
        if pairs is not None:
            bits = pairs[first : first + len(some)] << np.arange(len(some))[:, None]
            low = bits.sum(axis=0).astype(np.uint32).view(np.int32)
            table = torch.from_numpy(low).to(device.device)
        code.append(Fused(dtype, some, device.device, table))
    return Slot(dtype, code)


def _wrong(slot: Slot, plain: Slot, device: Device, *, hashing: bool) -> str:
    """What of some elements is not as on the CPU."""
    sides = _tough(slot.dtype)
    found = _found(slot, sides, device.device, hashing=hashing)
    expected = _found(plain, sides, _HERE, hashing=hashing)
    differ = [bool((one != other).any()) for one, other in zip(found, expected, strict=True)]
    return "bits" if differ[0] or differ[1] else "hashes" if differ[2] else ""


def _found(
    slot: Slot, sides: tuple[Bytes, Bytes], where: torch.device, *, hashing: bool
) -> tuple[Any, ...]:
    """Masks, counts, and sums of digests or zeros, of elements that are copied to a device."""
    base, tuned = (torch.from_numpy(side).to(where) for side in sides)
    elements, rules = len(sides[0]) * 8 // slot.dtype.bits, sum(code.rules for code in slot.code)
    table = Table.one(base.data_ptr(), tuned.data_ptr(), elements, where)
    masks = torch.zeros((rules, 64 * -(-elements // UNIT)), dtype=torch.uint8, device=where)
    counts = torch.zeros((rules, table.programs), dtype=torch.int32, device=where)
    sums = torch.zeros((4, table.programs), dtype=torch.int64, device=where)
    slot.compare(table, masks, counts, sums if hashing else None)
    return masks.cpu().numpy(), *(table.sums(some.cpu().numpy()) for some in (counts, sums))


class Plain:
    """The CPU's kernels on memory of torch's CPU device: the way of a GPU, but for its code."""

    def __init__(self, cpu: Kernels, index: int, dtype: DType, rules: int) -> None:
        self._cpu, self._index, self._bits, self.rules = cpu, index, dtype.bits, rules

    def __call__(
        self, table: Table, masks: Tensor | None, counts: Tensor, sums: Tensor | None
    ) -> None:
        """See fused.Fused."""
        rows = table.here[: COLUMNS * table.rows].reshape(-1, COLUMNS)
        columns = [rows[:, BASE], rows[:, TUNED], rows[:, ELEMENTS], rows[:, AT] * UNIT]
        columns += [np.full(table.rows, self._index), rows[:, UNIT_OF], np.arange(table.rows)]
        segments = np.stack(columns, axis=1)
        if masks is None:
            most = int((rows[:, AT] + -(-rows[:, ELEMENTS] // UNIT)).max())
            masks = torch.zeros((self.rules, 64 * most), dtype=torch.uint8)
        into, rest = (Results(table.rows, self.rules, with_statistics=False) for _ in range(2))
        self._cpu.run(segments, list(masks.numpy()), into)
        counts.zero_()
        counts.numpy()[:, rows[:, FIRST]] = into.changed.T
        if sums is not None:
            left = tails(segments, np.full(table.rows, self._bits))
            self._cpu.measure(left, masks[0].numpy(), rest)
            sums.zero_()
            sums.numpy()[:, rows[:, FIRST]] = (into.hashes - rest.hashes).view(np.int64).T

    def move(self, table: Table, mask: Tensor, ends: Tensor, out: tuple[Tensor, Tensor]) -> None:
        """See fused.Fused."""
        _, tuned, elements, *_ = table.here.tolist()
        flags = np.unpackbits(mask.numpy(), count=elements, bitorder="little")
        positions, values = (some.numpy() for some in out)
        positions[:] = np.flatnonzero(flags)
        values[:] = bytes_at(tuned, elements * self._bits // 8).view(values.dtype)[positions]


def _tough(dtype: DType) -> tuple[Bytes, Bytes]:
    """Both sides of some elements: large, small and special ones, equal, near and far."""
    noise = np.random.default_rng(0)
    size = max(dtype.bits, 8)  # of 4 and 6 bits there are some in a byte
    width, count = np.dtype(f"<u{size // 8}"), _TRIED * min(dtype.bits, 8) // 8

    def bits() -> npt.NDArray[np.unsignedinteger]:
        # fewer significant bits in some: small numbers, zeros, and small distances
        random = np.frombuffer(noise.bytes(count * width.itemsize), width)
        return np.asarray(random >> noise.integers(0, size, count).astype(width))

    base = bits()
    base[1::8] |= width.type((1 << size - 2) - 1 << 1)  # NaNs, infinities among the others
    base[2::8] |= width.type(1 << size - 1)
    tuned = base.copy()
    tuned[1::2] ^= bits()[1::2]
    tuned[4::8] = base[4::8] + width.type(1)
    tuned[6::8] ^= width.type(1 << size - 1)
    return base.view(np.uint8), tuned.view(np.uint8)

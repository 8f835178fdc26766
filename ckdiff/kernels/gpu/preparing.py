"""What is made once for each dtype: tables of 8-bit pairs, and the code that does all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ckdiff.dtypes import DType
from ckdiff.kernels import Kernels, Results, abi
from ckdiff.kernels.binding import bind
from ckdiff.kernels.gpu import changes
from ckdiff.kernels.gpu.pool import out_of_memory
from ckdiff.kernels.gpu.sizes import out_bytes
from ckdiff.kernels.gpu.staging import Device, Slot
from ckdiff.rules import Rule

__all__ = ["make_slots"]

Bytes = npt.NDArray[np.uint8]

_TRIED = 1 << 14  # elements: several of a launch's programs


def make_slots(
    cpu: Kernels, dtypes: Sequence[DType], rules: Sequence[Rule], device: Device
) -> tuple[list[Slot], str | None]:
    """(one a dtype, why one of them is not fused though it should be).

    Raises what torch raises.
    """
    slots = [
        Slot(dtype, [bind(rule, dtype) for rule in rules], [None] * len(rules)) for dtype in dtypes
    ]
    why: str | None = None
    for i, slot in enumerate(slots):
        pairs: Bytes | None = None
        if any(changes.needs_table(bound, slot.dtype) for bound in slot.bounds):
            every = np.arange(changes.PAIRS, dtype=np.uint16)
            base, tuned = (every >> 8).astype(np.uint8), every.astype(np.uint8)
            pairs = np.stack(_compared(cpu, i, slot, base, tuned))
        if device.fused and why is None:
            why = _fuse(cpu, i, slot, pairs, device)
        if pairs is not None and slot.fused is None:
            with device.lock, device.on(device.comparing):
                slot.tables = [
                    torch.from_numpy(_flags(line)).to(device.device)
                    if changes.needs_table(bound, slot.dtype)
                    else None
                    for line, bound in zip(pairs, slot.bounds, strict=True)
                ]
    return slots, why


def _fuse(cpu: Kernels, index: int, slot: Slot, pairs: Bytes | None, device: Device) -> str | None:
    """Set ``slot.fused``, or say why not.

    Compiling needs a compiler, a folder to write to, and a device that Triton knows, so whatever
    goes wrong there is no reason to stop. Nor is code trusted that nobody has seen run on this
    device: it is held against the CPU's on some elements first.
    """
    from ckdiff.kernels.gpu.fused import Fused

    if not Fused.supports(slot.bounds):
        return None
    base, tuned = _tough(slot.dtype)
    rules, size = len(slot.bounds), len(base)
    try:
        with device.lock, device.on(device.comparing):
            table: torch.Tensor | None = None
            if pairs is not None:
                bits = _flags(pairs).astype(np.int64) << np.arange(rules)[:, None]
                low = bits.sum(axis=0).astype(np.uint32).view(np.int32)
                table = torch.from_numpy(low).to(device.device)
            fused = Fused(slot.dtype, slot.bounds, device.device, table)
            both = torch.from_numpy(np.concatenate([base, tuned])).to(device.device)
            out = device.memory(out_bytes(_TRIED, rules))
            masks = out[: rules * _TRIED // 8].view(rules, -1)
            counts = out[rules * _TRIED // 8 :].view(torch.int32).view(rules, -1)
            fused(both[:size], both[size:], masks, counts)
            found, ones = masks.cpu().numpy(), counts.cpu().numpy()
    except Exception as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    expected = np.stack(_compared(cpu, index, slot, base, tuned))
    if (found != expected).any() or (ones.sum(axis=1) != np.bitwise_count(expected).sum(1)).any():
        return f"its code for {slot.dtype.name} gives other bits than the CPU's"
    slot.fused = fused
    return None


def _flags(bits: Bytes) -> npt.NDArray[np.bool_]:
    return np.unpackbits(bits, axis=-1, bitorder="little").view(np.bool_)


def _compared(cpu: Kernels, index: int, slot: Slot, base: Bytes, tuned: Bytes) -> list[Bytes]:
    """One mask a rule, as the CPU's kernels say."""
    elements = len(base) * 8 // slot.dtype.bits
    segment = np.zeros((1, abi.SEG_COLUMNS), np.int64)
    segment[0, abi.SEG_BASE], segment[0, abi.SEG_TUNED] = base.ctypes.data, tuned.ctypes.data
    segment[0, abi.SEG_ELEMENTS], segment[0, abi.SEG_SLOT] = elements, index
    masks = [np.zeros(elements // 8, np.uint8) for _ in slot.bounds]
    cpu.run(segment, masks, Results(1, len(masks), with_statistics=False))
    return masks


def _tough(dtype: DType) -> tuple[Bytes, Bytes]:
    """Both sides of some elements: large, small and special ones, equal, near and far."""
    noise = np.random.default_rng(0)
    if dtype.bits < 8:
        base = noise.integers(0, 256, _TRIED * dtype.bits // 8, np.uint8)
        return base, base ^ (base >> noise.integers(0, 9, len(base), np.uint8))
    width = np.dtype(f"<u{dtype.bits // 8}")

    def bits() -> npt.NDArray[np.unsignedinteger]:
        # fewer significant bits in some: small numbers, zeros, and small distances
        random = np.frombuffer(noise.bytes(_TRIED * width.itemsize), width)
        return np.asarray(random >> noise.integers(0, dtype.bits, _TRIED).astype(width))

    base = bits()
    base[1::8] |= width.type((1 << dtype.bits - 2) - 1 << 1)  # NaNs, infinities among the others
    base[2::8] |= width.type(1 << dtype.bits - 1)
    tuned = base.copy()
    tuned[1::2] ^= bits()[1::2]
    tuned[4::8] = base[4::8] + width.type(1)
    tuned[6::8] ^= width.type(1 << dtype.bits - 1)
    return base.view(np.uint8), tuned.view(np.uint8)

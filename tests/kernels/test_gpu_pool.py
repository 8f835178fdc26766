"""Stages for all workers: how large they are, what they take, and what if that is not there."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate

import numpy as np
import pytest
import torch

from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.sizes import SMALLEST, Sizes, staging_memory
from ckdiff.kernels.gpu.staging import Pool
from ckdiff.kernels.gpu.tables import Table

MIB = 1 << 20
LARGEST = 1 << 22  # elements of a piece
SIZES = Sizes(LARGEST, 1, 16)


class Small(Device):
    """A device with so many bytes of memory."""

    def __init__(self, room: int, why: str = "out of memory") -> None:
        super().__init__(torch.device("cpu"), "a small one")
        self.room, self.why, self.used, self.drops = room, why, 0, 0

    def memory(self, size: int) -> torch.Tensor:
        if self.used + size > self.room:
            raise RuntimeError(self.why)
        self.used += size
        found = super().memory(size)
        weakref.finalize(found.untyped_storage(), self._back, size)
        return found

    def _back(self, size: int) -> None:
        self.used -= size

    def drop_cache(self) -> None:
        self.drops += 1


def lent_once(pool: Pool) -> int:
    with pool.lent() as stages:
        return id(stages)


def test_everything_is_taken_at_once_and_lent() -> None:
    device = Small(1 << 30)
    pool = Pool(device, SIZES, 2, 1 << 30)
    assert pool.elements == LARGEST
    assert device.used == SIZES.needed(LARGEST, 2) - SIZES.needed(LARGEST, 0)
    with ThreadPoolExecutor(1) as other, pool.lent() as first:
        with pool.lent() as second:
            assert len({id(stage) for stage in (*first, *second)}) == 4

            waiting = other.submit(lent_once, pool)
            with pytest.raises(TooLate):
                waiting.result(0.05)
        assert waiting.result(30) == id(second)
    del pool, first, second, waiting
    assert device.used == 0


def test_pieces_get_smaller_until_they_fit() -> None:
    whole = SIZES.needed(LARGEST, 2) - SIZES.needed(LARGEST, 0)
    device = Small(whole // 3)
    pool = Pool(device, SIZES, 2, 1 << 30)
    assert pool.elements == LARGEST // 4
    assert device.used == whole // 4
    assert device.drops == 2
    assert list(pool.messages) == [
        "warning: a small one is out of memory: going on with smaller pieces"
    ]


@pytest.mark.parametrize("why", ["out of memory", "CUDA error: lost"])
def test_where_nothing_fits_it_is_an_error(why: str) -> None:
    device = Small(0, why)
    with pytest.raises(RuntimeError, match=why):
        Pool(device, SIZES, 1, 1 << 30)
    halves = (LARGEST // SMALLEST).bit_length() - 1
    assert device.drops == (halves if "memory" in why else 0)


def test_memory_follows_the_window_and_pinned_memory_is_rounded_as_torch_does() -> None:
    windows = [1 << 19, 1 << 20, 1 << 22, 1 << 25]
    found = [staging_memory(window, 4, 16) for window in windows]
    assert found == sorted(found)
    assert found[0] < found[-1] // 8
    # both stages of both sides; tables; then masks, digests and counts, rounded up
    assert Sizes(1 << 25, 4, 16).largest == 1 << 24
    assert found[-1] == 128 * MIB + 4 * MIB + 32 * MIB
    assert [Sizes(1 << 22, 1, bits).largest for bits in (4, 16, 64)] == [1 << 22] * 3
    assert Sizes(100, 1, 16).largest == SMALLEST
    inside = Sizes(1 << 25, 1, 64, copied=False)  # where nothing is copied, windows are not cut
    assert inside.largest == 1 << 25
    assert inside.parts(1 << 25)[0] == 0


@pytest.mark.parametrize("bits", [4, 6, 8, 16, 32, 64])
@pytest.mark.parametrize("length", [1, 511, 512, 5000])
def test_tables_and_what_is_found_fit_however_short_tensors_are(bits: int, length: int) -> None:
    parts = Sizes(SMALLEST, 3, bits).parts(SMALLEST)
    count = SMALLEST // (-(-length // 512) * 512)
    table = Table.of(*np.full((4, count), [[0], [0], [length], [0]]))
    assert table.here.nbytes <= parts[1]
    assert 3 * SMALLEST // 8 + (32 + 4 * 3) * table.programs <= parts[2]
    assert not any(size % 16 for size in parts)  # what follows is aligned for wide loads

"""Stages lent to workers, and memory that runs out: who makes pieces smaller, and who waits."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch

from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.pool import Pool
from ckdiff.kernels.gpu.sizes import SMALLEST, Sizes, staging_memory
from ckdiff.kernels.gpu.staging import Stages
from ckdiff.kernels.gpu.tables import Table

MIB = 1 << 20
LARGEST = 1 << 22  # elements of a piece


class Small(Device):
    """A device with so many bytes of memory."""

    def __init__(self, room: int) -> None:
        super().__init__(torch.device("cpu"), "a small one")
        self.room, self.used, self.drops = room, 0, 0

    def memory(self, size: int) -> torch.Tensor:
        if self.used + size > self.room:
            raise torch.cuda.OutOfMemoryError("no memory")
        self.used += size
        found = super().memory(size)
        weakref.finalize(found.untyped_storage(), self._back, size)
        return found

    def _back(self, size: int) -> None:
        self.used -= size

    def drop_cache(self) -> None:
        self.drops += 1


def pool_of(room: int) -> tuple[Small, Pool, int]:
    """The device, a pool of stages for bf16 on it, and the bytes of one worker's."""
    device = Small(room)
    sizes = Sizes(LARGEST, 1, 16)
    return device, Pool(device, sizes, LARGEST), 2 * sizes.there(LARGEST)


def taken(pool: Pool) -> Stages:
    stages = pool.take()
    assert stages is not None
    return stages


def test_what_is_given_back_is_lent_again() -> None:
    device, pool, whole = pool_of(1 << 30)
    first = taken(pool)
    pool.give_back(first)
    assert taken(pool) is first
    second = taken(pool)
    assert second is not first
    assert device.used == 2 * whole


def test_a_worker_that_finds_no_memory_takes_smaller_stages() -> None:
    device, pool, whole = pool_of(0)
    device.room = whole + whole // 2
    first, second = taken(pool), taken(pool)
    assert (first.elements, second.elements) == (LARGEST, LARGEST // 2)
    assert list(pool.messages) == [
        "warning: a small one is out of memory: going on with smaller pieces"
    ]
    assert device.drops == 1
    pool.give_back(first)  # it is of no use any more
    del first
    assert device.used == whole // 2
    pool.give_back(second)
    assert taken(pool) is second


def test_nobody_makes_pieces_smaller_while_larger_ones_end() -> None:
    """With room for one worker's only, the second one waits for it: once it is made smaller."""
    device, pool, whole = pool_of(0)
    device.room = whole
    held: list[Stages] = [taken(pool)]
    found: list[Stages] = []
    second = threading.Thread(target=lambda: found.append(taken(pool)), daemon=True)
    second.start()
    while device.drops < 1:  # it has made pieces smaller, and looks for room again
        second.join(0.01)
    second.join(0.2)
    assert second.is_alive()
    pool.give_back(held.pop())
    second.join(30)
    assert [stages.elements for stages in found] == [LARGEST // 2]
    assert len(pool.messages) == 1


def test_idle_stages_make_room() -> None:
    device, pool, whole = pool_of(0)
    device.room = 2 * whole
    both = [taken(pool), taken(pool)]
    for stages in both:
        pool.give_back(stages)
    del both, stages
    assert device.used == 2 * whole
    pool.ran_out(taken(pool))  # such as that intermediate results do not fit
    assert device.used == 0
    assert taken(pool).elements == LARGEST // 2


def test_giving_up_holds_nothing() -> None:
    device, pool, _ = pool_of(1 << 30)
    other = taken(pool)
    pool.give_back(taken(pool))
    count = 0
    while (stages := pool.take()) is not None:
        count += 1
        assert stages.elements >= SMALLEST
        if count == 2:
            pool.give_back(other)  # or the others would wait for it
            del other
        pool.ran_out(stages)
    assert pool.gave_up
    assert count == (LARGEST // SMALLEST).bit_length()
    assert pool.messages[-1].endswith("comparing on the CPU from here on")
    del stages
    assert device.used == 0


def test_another_error_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(size: int) -> torch.Tensor:
        raise RuntimeError("CUDA error: lost")

    device, pool, _ = pool_of(1 << 30)
    with monkeypatch.context() as patch:
        patch.setattr(device, "memory", lost)
        with pytest.raises(RuntimeError, match="lost"):
            pool.take()
    assert taken(pool).elements == LARGEST


# -- sizes -----------------------------------------------------------------------------------------


def test_host_memory_follows_the_window_and_is_rounded_as_torch_does() -> None:
    windows = [1 << 19, 1 << 20, 1 << 22, 1 << 25]
    found = [staging_memory(window, 4, 16) for window in windows]
    assert found == sorted(found)
    assert found[0] < found[-1] // 8
    # both stages of both sides; tables; then masks, digests and counts, rounded up
    assert Sizes(1 << 25, 4, 16).largest == 1 << 24
    assert found[-1] == 128 * MIB + 4 * MIB + 32 * MIB
    assert [Sizes(1 << 22, 1, bits).largest for bits in (4, 16, 64)] == [1 << 22] * 3
    assert Sizes(100, 1, 16).largest == SMALLEST


def test_device_memory_is_counted_in_the_blocks_that_torch_takes() -> None:
    sizes = Sizes(1 << 25, 1, 16)
    block = 2 * sizes.there(sizes.largest)  # of each worker, in 2 MiB steps; then what is small
    assert sizes.needed(sizes.largest, 4) == 4 * -(-block // (2 * MIB)) * 2 * MIB + 32 * MIB
    block = 2 * sizes.there(SMALLEST)
    each = 20 * MIB // block
    assert sizes.needed(SMALLEST, each) == 20 * MIB + 32 * MIB
    assert sizes.needed(SMALLEST, each + 1) == 40 * MIB + 32 * MIB


@pytest.mark.parametrize("bits", [4, 6, 8, 16, 32, 64])
@pytest.mark.parametrize("length", [1, 511, 512, 5000])
def test_tables_and_what_is_found_fit_however_short_tensors_are(bits: int, length: int) -> None:
    sizes = Sizes(SMALLEST, 3, bits)
    count = SMALLEST // (-(-length // 512) * 512)
    table = Table.of(*np.full((4, count), [[0], [0], [length], [0]]))
    assert table.here.nbytes <= sizes.tables(SMALLEST)
    counts = 4 * 3 * table.programs
    assert 3 * SMALLEST // 8 + 32 * SMALLEST // 512 + counts <= sizes.out(SMALLEST)

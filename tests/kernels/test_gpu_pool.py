"""Stages lent to workers, and memory that runs out: who makes pieces smaller, and who waits."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

from ckdiff.dtypes import DTYPES
from ckdiff.kernels.gpu.pool import Pool
from ckdiff.kernels.gpu.sizes import (
    LARGEST_SIDE,
    SMALLEST_SIDE,
    Sizes,
    largest_side,
    staging_memory,
)
from ckdiff.kernels.gpu.staging import Device, Stages
from ckdiff.rules import Rule

MIB = 1 << 20
RULES = [Rule.parse("exact")]


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
    sizes = Sizes([DTYPES["BF16"]], RULES, 1 << 22, ())
    whole = 2 * (2 * LARGEST_SIDE + sizes.out(LARGEST_SIDE))
    return device, Pool(device, sizes, LARGEST_SIDE), whole


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
    assert (first.side, second.side) == (LARGEST_SIDE, LARGEST_SIDE // 2)
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
    assert [stages.side for stages in found] == [LARGEST_SIDE // 2]
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
    assert taken(pool).side == LARGEST_SIDE // 2


def test_giving_up_holds_nothing() -> None:
    device, pool, _ = pool_of(1 << 30)
    other = taken(pool)
    pool.give_back(taken(pool))
    count = 0
    while (stages := pool.take()) is not None:
        count += 1
        assert stages.side >= SMALLEST_SIDE
        if count == 2:
            pool.give_back(other)  # or the others would wait for it
            del other
        pool.ran_out(stages)
    assert pool.gave_up
    assert count == (LARGEST_SIDE // SMALLEST_SIDE).bit_length()
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
    assert taken(pool).side == LARGEST_SIDE


# -- sizes -----------------------------------------------------------------------------------------


def test_host_memory_follows_the_window_and_is_rounded_as_torch_does() -> None:
    windows = [1 << 19, 1 << 20, 1 << 21, 1 << 22]
    found = [staging_memory(window, 4, 16) for window in windows]
    assert found == sorted(found)
    assert found[0] < found[-1] // 3
    # both stages of both sides, and masks and counts: 2 * 4 * (2**22 / 8 + 2**22 / 128) rounded up
    assert found[-1] == 16 * MIB + 8 * MIB
    assert largest_side(1 << 19, 16) == MIB
    assert largest_side(1 << 19, 4) == SMALLEST_SIDE
    assert largest_side(1 << 22, 64) == LARGEST_SIDE


def test_one_launch_needs_no_memory_for_intermediate_results() -> None:
    of = [DTYPES["BF16"], DTYPES["F64"]]
    rules = [Rule.parse("exact"), Rule.parse("rtol=1e-3@bf16")]
    fused, half, eager = (Sizes(of, rules, 1 << 22, some) for some in ((), of[1:], of))
    needed = [sizes.needed(LARGEST_SIDE, 4) for sizes in (fused, half, eager)]
    assert needed == sorted(set(needed))
    assert fused.scratch(LARGEST_SIDE) == 0
    # a block of 2 x (8 MiB + masks and counts) for each worker, in 2 MiB steps; then what is small
    block = 2 * (8 * MIB + fused.out(LARGEST_SIDE))
    assert needed[0] == 4 * -(-block // (2 * MIB)) * 2 * MIB + 32 * MIB


def test_small_blocks_share_what_torch_takes_for_them() -> None:
    sizes = Sizes([DTYPES["BF16"]], RULES, 1 << 22, ())
    block = 2 * (2 * SMALLEST_SIDE + sizes.out(SMALLEST_SIDE))
    each = 20 * MIB // block
    assert sizes.needed(SMALLEST_SIDE, each) == 20 * MIB + 32 * MIB
    assert sizes.needed(SMALLEST_SIDE, each + 1) == 40 * MIB + 32 * MIB

"""Readers that take memory by themselves: whoever opens them has it in the sum of their work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mask_stores import make_store, random_base

import ckdiff
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.diffs.plan import plan
from ckdiff.options import Options
from ckdiff.running.memory import PROCESS

MIB = 1 << 20
EACH = 64 * MIB
SHAPES = {"layers.0.w": ("BF16", (300, 40)), "layers.1.w": ("BF16", (2000,))}


class Costly:
    """Makes checkpoints whose readers say that they take so much, and counts them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.cost: Callable[[int], int] = lambda window: EACH
        self.now = self.most = self.opened = 0

    def __call__(self, path: Path) -> Checkpoint:
        side: Any = self._stack.enter_context(ckdiff.open_checkpoint(path))
        make = side.reader

        def reader() -> Any:
            found = make()
            close = found.close
            self.now += 1
            self.opened += 1
            self.most = max(self.most, self.now)

            def closed() -> None:
                self.now -= 1
                close()

            found.close = closed
            return found

        side.reader, side.reader_memory = reader, lambda window: self.cost(window)
        return side  # type: ignore[no-any-return]


class World:
    """Two checkpoints, a store and a delta of them."""

    def __init__(self, folder: Path, costly: Costly) -> None:
        rng = np.random.default_rng(0)
        base = random_base(rng, SHAPES)
        self.stores = []
        for i in range(2):
            masks = {name: rng.random(shape) < 0.3 for name, (_, shape) in SHAPES.items()}
            self.stores.append(make_store(folder / f"run{i}.zarr", base, masks).path)
        sides = folder / "run0.checkpoints"
        self.base, self.tuned = (costly(sides / side) for side in ("base", "tuned"))
        self.deltas = [folder / "one.ckd"]
        ckdiff.delta(sides / "base", sides / "tuned", self.deltas[0])
        self.out = folder / "out"


def run_diff(world: World, **how: Any) -> object:
    return ckdiff.diff(world.base, world.tuned, **how)


def run_overlap(world: World, **how: Any) -> object:
    return ckdiff.overlap(world.stores, nulls=["magnitude"], base=world.base, **how)


def run_delta(world: World, **how: Any) -> object:
    return ckdiff.delta(world.base, world.tuned, world.out, **how)


def run_apply(world: World, **how: Any) -> object:
    return ckdiff.apply(world.base, world.deltas, world.out, **how)


def run_graft(world: World, **how: Any) -> object:
    return ckdiff.graft(world.base, world.tuned, world.stores[0], world.out, **how)


@pytest.fixture
def costly() -> Any:
    with ExitStack() as stack:
        yield Costly(stack)


@pytest.fixture
def world(tmp_path: Path, costly: Costly) -> World:
    return World(tmp_path, costly)


@pytest.mark.parametrize("run", [run_diff, run_overlap, run_delta, run_apply, run_graft])
def test_readers_are_in_the_budget(
    world: World, costly: Costly, run: Callable[..., object]
) -> None:
    least = 190 * MIB  # enough for all of these, where readers take nothing
    with pytest.raises(ckdiff.BudgetError, match="memory is too little"):
        run(world, workers=1, memory=least)
    assert costly.opened == 0
    assert not world.out.exists()
    allowed = 320 * MIB
    run(world, workers=1, memory=allowed)
    assert 0 < costly.most * EACH <= allowed - PROCESS
    assert costly.now == 0
    costly.cost = lambda window: 0
    run(world, workers=1, memory=least, **({"overwrite": True} if world.out.exists() else {}))


def test_an_import_for_a_base_has_them_too(world: World, costly: Costly, tmp_path: Path) -> None:
    ckdiff.export_masks(world.stores[0], tmp_path / "masks.safetensors")
    costly.cost = lambda window: 4 * EACH
    with pytest.raises(ckdiff.BudgetError, match="memory is too little"):
        ckdiff.import_masks(tmp_path / "masks.safetensors", world.out, base=world.base)
    assert costly.opened == 0
    costly.cost = lambda window: EACH
    ckdiff.import_masks(tmp_path / "masks.safetensors", world.out, base=world.base)
    assert costly.most == 1


def test_fewer_workers_where_nobody_asked(world: World, costly: Costly, tmp_path: Path) -> None:
    """A delta of several groups: each worker has two readers."""
    rng = np.random.default_rng(1)
    content = random_base(rng, {"big": ("U8", (9 << 20,)), "more": ("U8", (9 << 20,))})
    flags = {name: np.zeros(9 << 20, np.bool_) for name in content}
    make_store(tmp_path / "big.zarr", content, flags)
    sides = [costly(tmp_path / "big.checkpoints" / side) for side in ("base", "tuned")]
    allowed = 290 * MIB
    ckdiff.delta(*sides, tmp_path / "big.ckd", memory=allowed)
    assert costly.most == 2
    with pytest.raises(ckdiff.BudgetError, match="with 2 workers"):
        ckdiff.delta(*sides, tmp_path / "other.ckd", workers=2, memory=allowed)


def test_windows_of_a_diff_shrink(world: World, costly: Costly) -> None:
    options = Options(workers=1, memory=160 * MIB)
    costly.cost = lambda window: 0
    with plan(world.base, world.tuned, None, options) as planned:
        usual = planned.allotment.window
    costly.cost = lambda window: 8 * window  # two readers, and two bytes for each element
    with plan(world.base, world.tuned, None, options) as planned:
        found = planned.allotment
        assert found.window < usual
        assert 2 * 8 * 2 * found.window < found.needed <= found.memory

"""Runners: the tree of sums, what observers are told, interruptions, and the sum of memory."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from derived_stores import FirstBits, first_bits
from hypothesis import given
from hypothesis import strategies as st

from ckdiff import budget
from ckdiff.budget import MIB
from ckdiff.errors import BudgetError, Interrupted
from ckdiff.options import Observer, Progress
from ckdiff.running.memory import PROCESS, Need, fit_workers
from ckdiff.running.runners import Meter, add_up, interruptible, run_chunks
from ckdiff.running.tree import Tree, run_tree


def by_levels(items: list[str]) -> str:
    """The tree as it is described: neighbours are merged, an odd one goes up by itself."""
    while len(items) > 1:
        pairs = [f"({a}{b})" for a, b in zip(items[::2], items[1::2], strict=False)]
        items = pairs + items[len(pairs) * 2 :]
    return items[0]


class Letters:
    """A task whose results show how they were added."""

    def __call__(self, chunk: int, stop: threading.Event) -> str:
        return chr(97 + chunk)

    def merge(self, left: str, right: str) -> str:
        return f"({left}{right})"


@given(st.integers(1, 26), st.randoms(use_true_random=False))
def test_the_tree_depends_on_the_number_only(count: int, shuffled: random.Random) -> None:
    letters = [chr(97 + i) for i in range(count)]
    order = list(range(count))
    shuffled.shuffle(order)
    tree: Tree[str] = Tree(count, Letters().merge)
    for i in order:
        tree.put(i, letters[i])
    assert tree.root() == by_levels(letters)


def test_adding_up_on_threads() -> None:
    said: list[Progress] = []
    meter = Meter(Observer(progress=said.append), 70)
    assert add_up(7, Letters(), workers=3, meter=meter) == by_levels([*"abcdefg"])
    assert [p.done for p in said] == sorted(p.done for p in said)
    assert {0, 10, 70} <= {p.done for p in said} <= set(range(0, 80, 10))

    class Failing(Letters):
        def merge(self, left: str, right: str) -> str:
            raise BudgetError("no more")

    with pytest.raises(BudgetError, match="no more"):
        run_tree(7, Failing(), workers=2)


def test_a_meter_tells_what_was_done_before_and_ends_with_all() -> None:
    said: list[Progress] = []
    meter = Meter(Observer(progress=said.append), 100, resumed=40)
    found: list[int] = []

    def task(chunk: int, stop: threading.Event) -> int:
        meter.add(35)  # too much, as an estimate may be
        return chunk

    run_chunks(
        range(2), task, workers=2, done=lambda chunk, result: found.append(result), meter=meter
    )
    assert sorted(found) == [0, 1]
    assert [(p.done, p.total, p.resumed) for p in said][-1] == (100, 100, 40)
    assert all(40 <= p.done <= 100 for p in said)


@pytest.mark.parametrize("hint", [None, "nothing was written", lambda: "resume"])
def test_interruptions(hint: object) -> None:
    with pytest.raises(Interrupted) as caught, interruptible(hint):  # type: ignore[arg-type]
        raise KeyboardInterrupt
    assert caught.value.hint == (hint() if callable(hint) else hint)


def test_fitting_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "cgroup_limit", lambda: None)
    need = Need(tables=10 * MIB, worker=50 * MIB)
    assert need.total(2) == PROCESS + 110 * MIB
    assert fit_workers(8, 100, need, "8GiB") == 8
    assert fit_workers(8, 3, need, None) == 3
    assert fit_workers(8, 0, need, None) == 1
    assert fit_workers(None, 1, need, need.total(1)) == 1
    with pytest.raises(BudgetError, match=r"with 2 workers this needs 206\.0 MiB"):
        fit_workers(2, 9, need, need.total(2) - 1)
    assert fit_workers(9, 9, Need(0, 200 * MIB), None) == 1  # not asked for any memory
    monkeypatch.setattr(budget, "cgroup_limit", lambda: 2 * PROCESS)
    with pytest.raises(BudgetError) as caught:
        fit_workers(2, 9, need, None, option=False)
    assert "--memory" not in str(caught.value)


def test_derived_stores_keep_to_the_default_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FirstBits, "need", Need(tables=0, worker=60 * MIB))
    monkeypatch.setattr(budget, "cgroup_limit", lambda: 2 * 160 * MIB)
    with pytest.raises(BudgetError, match="160"):
        first_bits(tmp_path / "a.zarr", {"a": (1000, 3)})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(budget, "cgroup_limit", lambda: None)
    first_bits(tmp_path / "a.zarr", {"a": (1000, 3)})


def test_overlaps_here_import_nothing_of_dask(tmp_path: Path) -> None:
    for name in "ab":
        first_bits(tmp_path / name, {"a": (1000, 3)})
    script = (
        "import sys, ckdiff; found = ckdiff.overlap(sys.argv[1:]).counts.tolist();"
        "print(found, {'dask', 'distributed', 'zarr'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a", tmp_path / "b"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["[[3,", "3],", "[3,", "3]]", "set()"]

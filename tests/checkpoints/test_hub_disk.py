"""How much is fetched at a time, and where it fits: the disk that streaming may use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hub_server import Hub, only_hub, safetensors
from support import Tensor

import ckdiff
from ckdiff.checkpoints.files import FileCheckpoint
from ckdiff.checkpoints.opening import open_for_streaming
from ckdiff.checkpoints.places.hub.spool import Range, ranges, room_for
from ckdiff.checkpoints.places.hub.streamed import StreamedPlace
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.cli import main
from ckdiff.diffs.allotment import Allotment
from ckdiff.diffs.comparison import Comparison, Selection
from ckdiff.diffs.disksharing import _windows, share_disk
from ckdiff.diffs.task import LARGEST_WINDOW, SMALLEST_WINDOW
from ckdiff.options import Options
from ckdiff.running.ahead import AHEAD

MIB = 1 << 20
KIB = 1 << 10


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with only_hub(tmp_path, monkeypatch) as hub:
        yield hub


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def put(hub: Hub, repo: str, seed: int, **sizes: int) -> str:
    """A model of BF16 tensors with so many bytes."""
    tensors: dict[str, Tensor] = {
        name: ("BF16", (size // 2,), noise(seed + i, size))
        for i, (name, size) in enumerate(sizes.items())
    }
    hub.put(repo, {"model.safetensors": safetensors(tensors)})
    return f"hf://{repo}"


# -- ranges ----------------------------------------------------------------------------------------


def fetched(found: list[Range]) -> int:
    return sum(one.stop - one.begin for one in found)


def columns(*spans: tuple[int, int, int]) -> list[Any]:
    return list(np.array(spans, np.int64).T)


def test_neighbours_come_together() -> None:
    found = ranges(*columns((0, 100, 50), (1, 0, 10), (0, 0, 100), (0, 120, 100)))
    assert [(one.file, one.begin, one.stop) for one in found] == [(0, 0, 220), (1, 0, 10)]
    assert sorted(found[0].spans) == [(0, 100), (2, 0), (3, 120)]


def test_small_gaps_are_fetched_while_they_are_few() -> None:
    apart = columns(*((0, i * 10_000, 16) for i in range(1000)))
    found = ranges(*apart)
    assert 990 < len(found) < 1000
    assert fetched(found) <= room_for(16_000, 1000) - 64 * 1000
    near = columns(*((0, i * 1000, 900) for i in range(1000)))
    assert len(ranges(*near)) == 1  # a ninth more
    assert len(ranges(*near, between=False)) == 1000
    far = columns((0, 0, MIB), (0, MIB + 70_000, MIB))
    assert len(ranges(*far)) == 2


def test_the_smallest_gaps_first() -> None:
    found = ranges(*columns((0, 0, 16), (0, 40_016, 16), (0, 40_042, 16), (0, 80_058, 16)))
    assert [(one.begin, one.stop) for one in found] == [(0, 40_058), (80_058, 80_074)]


@pytest.mark.parametrize("seed", range(20))
def test_a_window_never_needs_more_than_it_is_given(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gaps, sizes = rng.integers(0, 90_000, 200), rng.integers(1, 10 ** rng.integers(2, 6), 200)
    begins = np.cumsum(gaps + np.r_[0, sizes[:-1]])
    found = ranges(np.zeros(200, np.int64), begins, sizes)
    taken = sum(-(-(one.stop - one.begin) // 64) * 64 for one in found)
    assert taken <= room_for(int(sizes.sum()), 200)
    order = rng.permutation(200)
    again = ranges(np.zeros(200, np.int64), begins[order], sizes[order])
    assert [(one.begin, one.stop) for one in again] == [(one.begin, one.stop) for one in found]


def test_many_small_tensors_far_from_each_other(hub: Hub) -> None:
    sizes = {f"{kind}.{i}": n for i in range(100) for kind, n in (("s", 32), ("big", 60_000))}
    base, tuned = put(hub, "o/a", 1, **sizes), put(hub, "o/b", 500, **sizes)
    result = ckdiff.diff(base, tuned, stream=True, include=["s.*"])
    assert result.bytes_read == 2 * 100 * 32
    asked = [r.range[1] - r.range[0] for r in hub.requests if r.range is not None]
    assert sum(asked) <= 2 * (64 * KIB + 64 * KIB + 3200)  # headers, gaps, and what is wanted


# -- sharing ---------------------------------------------------------------------------------------


def place_of(side: Checkpoint) -> StreamedPlace:
    assert isinstance(side, FileCheckpoint)
    assert isinstance(side.place, StreamedPlace)
    return side.place


def shared(hub: Hub, count: int, **asked: Any) -> tuple[list[StreamedPlace], Allotment, list[str]]:
    """What each of two streams gets."""
    notes: list[str] = []
    with ExitStack() as stack:
        sides = [stack.enter_context(closing(open_for_streaming(f"hf://o/{x}"))) for x in "ab"]
        comparison = Comparison(sides[0], sides[1], Selection())
        found = share_disk(
            comparison,
            Allotment(count, LARGEST_WINDOW, 1 << 28, 1 << 27),
            Options(stream=True, **asked),
            on_cluster=False,
            note=notes.append,
        ).allotment
    return [place_of(side) for side in sides], found, notes


@pytest.fixture
def pair(hub: Hub) -> Hub:
    for repo, seed in (("o/a", 1), ("o/b", 9)):
        put(hub, repo, seed, small=1000, large=20 * MIB, mid=7_654_322)
    return hub


def test_each_window_is_counted_to_the_byte(pair: Hub) -> None:
    with ExitStack() as stack:
        sides = [stack.enter_context(closing(open_for_streaming(f"hf://o/{x}"))) for x in "ab"]
        comparison = Comparison(sides[0], sides[1], Selection())
        for window in (SMALLEST_WINDOW, LARGEST_WINDOW):
            nbytes, most = _windows(comparison, window)
            total = comparison.layout.total
            for i, first in enumerate(range(0, total, window)):
                spans = comparison.to_read(first, min(first + window, total))
                assert nbytes[i] == spans.byte_ranges(comparison.bits)[1].sum()
                assert most[i] >= len(spans)
            assert len(nbytes) == i + 1


def test_a_spool_is_no_larger_than_what_a_worker_asks_for(pair: Hub) -> None:
    sides, found, notes = shared(pair, 1, disk="64GiB")
    assert (found.workers, found.window, notes) == (1, LARGEST_WINDOW, [])
    four = (1 + AHEAD) * 2 * LARGEST_WINDOW
    assert [side.spool for side in sides] == [sides[0].spool] * 2
    assert 27 * MIB < sides[0].spool < four * 1.2
    put(pair, "o/a", 1, tiny=1000)
    put(pair, "o/b", 2, tiny=1000)
    sides, _, _ = shared(pair, 1, disk="64GiB")
    assert sides[0].spool < 128 * KIB


def test_windows_are_smaller_where_the_disk_is(pair: Hub) -> None:
    sides, found, notes = shared(pair, 2, disk="16MiB", workers=2)
    assert found.workers == 2
    assert SMALLEST_WINDOW <= found.window < LARGEST_WINDOW
    assert not notes
    assert sides[0].spool <= 4 * MIB


def test_fewer_workers_where_nobody_asked_for_more(pair: Hub) -> None:
    sides, found, notes = shared(pair, 64, disk="32MiB")
    assert 1 <= found.workers < 64
    assert notes == [f"{found.workers} workers instead of 64, to keep to 32.0 MiB of disk"]
    assert sides[0].spool * 2 * found.workers <= 32 * MIB
    with pytest.raises(ckdiff.BudgetError, match="of disk is too little for 64 workers"):
        shared(pair, 64, disk="32MiB", workers=64)
    with pytest.raises(ckdiff.BudgetError, match="of disk is too little for one worker"):
        shared(pair, 64, disk="1MiB")


def test_what_is_free_counts_as_well(pair: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckdiff.diffs.disksharing.free_space", lambda folder: 20 * MIB)
    sides, _, _ = shared(pair, 1, disk="1GiB")
    assert 2 * sides[0].spool <= 20 * MIB
    monkeypatch.setattr("ckdiff.diffs.disksharing.free_space", lambda folder: MIB)
    with pytest.raises(ckdiff.BudgetError, match=r"this needs .* free in /") as raised:
        shared(pair, 1, disk="1GiB")
    assert "TMPDIR" in str(raised.value.hint)


@pytest.mark.parametrize("disk", ["3MiB", "8MiB", "20MiB", "1GiB"])
def test_nothing_is_fetched_twice_whatever_the_disk(pair: Hub, disk: str) -> None:
    pair.requests.clear()
    result = ckdiff.diff("hf://o/a", "hf://o/b", stream=True, disk=disk)
    asked = [r.range[1] - r.range[0] for r in pair.requests if r.range is not None]
    assert sum(asked) <= result.bytes_read + (2 << 16)
    assert result.rules["exact"]["changed"] > 0


# -- dry runs --------------------------------------------------------------------------------------


def estimate(*arguments: str) -> dict[str, Any]:
    ran = CliRunner().invoke(main, ["diff", "hf://o/a", "hf://o/b", "--dry-run", "--json",
                                    "--stream", *arguments])  # fmt: skip
    assert ran.exit_code == 0, ran.output
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_a_dry_run_says_what_would_be_fetched(pair: Hub) -> None:
    everything = 2 * (1000 + 20 * MIB + 7_654_322)
    assert estimate()["bytes_to_download"] == everything
    assert estimate("--exclude", "large")["bytes_to_download"] == everything - 40 * MIB
    assert estimate()["refusal"] is None
    assert pair.downloaded() == []


def test_a_dry_run_says_what_would_be_refused(pair: Hub, tmp_path: Path) -> None:
    refusal = estimate("--disk", "1MiB")["refusal"]
    with pytest.raises(ckdiff.BudgetError) as raised:
        ckdiff.diff("hf://o/a", "hf://o/b", stream=True, disk="1MiB")
    assert refusal == raised.value.one_line()
    out = tmp_path / "out.zarr"
    ckdiff.diff("hf://o/a", "hf://o/b", out, stream=True)
    assert "exists" in estimate("-o", str(out))["refusal"]


def test_a_dry_run_of_what_cannot_be_streamed(pair: Hub, tmp_path: Path) -> None:
    local = tmp_path / "local.safetensors"
    local.write_bytes(safetensors({"w": ("U8", (4,), b"abcd")}))
    for more in ([], ["--dry-run"]):
        ran = CliRunner().invoke(main, ["diff", str(local), str(local), "--stream", *more])
        assert ran.exit_code == 2
        assert "neither checkpoint is on the hub" in ran.output


def test_a_dry_run_of_one_side(pair: Hub, tmp_path: Path) -> None:
    local = tmp_path / "local.safetensors"
    local.write_bytes(pair.repositories["o/a"]["main"].files["model.safetensors"])
    ran = CliRunner().invoke(
        main, ["diff", str(local), "hf://o/b", "--stream", "--dry-run", "--json"]
    )
    assert json.loads(ran.stdout)["bytes_to_download"] == 1000 + 20 * MIB + 7_654_322

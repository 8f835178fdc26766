"""Files that are mapped: what of them stays in our resident set, and what is asked ahead."""

from __future__ import annotations

import mmap
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support import write_safetensors

from ckdiff.checkpoints.opening import open_local
from ckdiff.checkpoints.places import mapped
from ckdiff.kernels.advising import advise
from ckdiff.kernels.memory import bytes_at

STEP, STEPS = 1 << 21, 16
DATA = np.random.default_rng(1).integers(0, 256, STEP * STEPS, np.uint8)


def one(number: int) -> npt.NDArray[np.int64]:
    return np.array([number], np.int64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "model.safetensors"
    write_safetensors(found, {"w": ("U8", (len(DATA),), DATA.tobytes())})
    return found


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in our resident set."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the kernel is advised from now on."""
    advice = list[int]()

    def noted(ranges: npt.NDArray[np.int64], what: int) -> int:
        advice.append(what)
        return advise(ranges, what)

    monkeypatch.setattr(mapped, "advise", noted)
    return advice


def test_what_was_read_is_dropped_some_windows_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_BEHIND", 4 * STEP)
    with open_local(path) as side:
        most = 0
        with closing(side.reader()) as reader:
            advice = asked(monkeypatch)
            for at in range(STEPS):
                (address,) = reader.acquire(one(0), one(at * STEP), one(STEP)).tolist()
                assert np.array_equal(bytes_at(address, STEP), DATA[at * STEP :][:STEP])
                most = max(most, resident(path))
                reader.release()
        assert STEP <= most <= 8 * STEP  # windows end inside pages, which may be large
        assert advice.count(mmap.MADV_DONTNEED) <= STEPS // 4 + 1
        assert resident(path) == 0


def test_what_a_chunk_saw_the_next_one_knows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_local(path) as side:
        for cold in (False, True):
            monkeypatch.setattr(mapped, "_WARM", 1e30 if cold else 0)
            with closing(side.reader()) as reader:
                reader.acquire(one(0), one(0), one(STEP))
                reader.release()
            advice = asked(monkeypatch)
            with closing(side.reader()) as reader:
                reader.prefetch(one(0), one(0), one(STEP))
            assert (mmap.MADV_WILLNEED in advice) == cold

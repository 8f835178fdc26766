"""Kernels are called with arrays: what does not fit is an error and never a wrong count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from kernel_runs import kernels

from ckdiff.kernels import Results, counting, delta, entropy, moving, sample, zstd
from ckdiff.kernels.abi import PIECE, PLACES_MARGIN
from ckdiff.kernels.blending import Blend
from ckdiff.kernels.casting import narrow, widen
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.memory import bytes_at, views
from ckdiff.kernels.profiles import MARGIN, Profile
from ckdiff.kernels.scaling import Scaling, scale


def u8(size: int) -> np.ndarray:
    return np.zeros(size, np.uint8)


def i64(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int64)


def segments(*row: int) -> np.ndarray:
    return np.array([row], np.int64)


def compare(*row: int, size: int = 64) -> None:
    """Run a segment of bytes: elements, position, slot, unit, row."""
    compared, side = kernels(("U8",), ("exact",)), u8(512)
    at = side.ctypes.data
    into = Results(1, 1, with_statistics=False)
    compared.run(segments(at, at, *row), [u8(size)], into)


STREAMS = delta.Streams(
    u8(200).reshape(1, -1), u8(400).reshape(1, -1), u8(600), u8(1536).reshape(3, -1)
)
GAPS = delta.Gaps(u8(100), u8(100), u8(1 << 15))
JOB = moving.Job(u8(64), u8(64), u8(8), u8(8), segments(0, 0, 0, 2), u8(4 + PLACES_MARGIN), 0)
BLOCKS = Scaling("F8_E4M3", "F32", 3, 10, (2, 10))

#: calls that are right; each has something that can be made wrong below
RIGHT: dict[str, Callable[[], object]] = {
    "agree": lambda: counting.agree(segments(64, 0, 0, 0, 64), u8(128), i64(1, 3), i64(1, 3)),
    "combine": lambda: counting.combine(
        "odd", segments(64, 0, 0, 0, 64), u8(128), 0, u8(64), i64(1)
    ),
    "margins": lambda: counting.margins(u8(8), 60, 3, i64(7), i64(10)),
    "profile": lambda: Profile(10).add(u8(9 + MARGIN), 3, 0, i64(6)),
    "survey": lambda: entropy.survey(u8(64)),
    "encode": lambda: entropy.Coder().encode(u8(PIECE), np.ones(1 << 16, np.uint32)),
    "draw": lambda: sample.draw((1, 2), 0, 100, 9, u8(16)),
    "decode": lambda: zstd.decode(segments(0, 0, 0), u8(8), u8(64), 64),
    "hash": lambda: ContentHasher().add(np.zeros(2, np.uint64), u8(100), 0, 8),
    "blend": lambda: Blend(16)(u8(20), u8(20), u8(2), u8(20), 10),
    "compare": lambda: compare(512, 0, 0, 0, 0),
    "split": lambda: delta.split("16f", [0], u8(512), u8(512), STREAMS),
    "merge": lambda: delta.merge("16f", [(0, 256)], 0, u8(512), u8(512), STREAMS),
    "tally": lambda: delta.tally("16f", u8(512), u8(512), 1, 7, i64(256, 2)),
    "gaps": lambda: delta.gaps(u8(8), 64, 0, 0, GAPS, flip=False),
    "pair": lambda: delta.pair(u8(74), 10, u8(32), u8(74)),
    "move": lambda: moving.mover("gather", 4, [JOB])(),
    "widen": lambda: widen(u8(20), "BF16", "F32", u8(40)),
    "narrow": lambda: narrow(u8(20), "F32", "BF16", u8(10)),
    "scale": lambda: scale(u8(20), BLOCKS, 10, u8(8), 0, u8(80)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_fits_is_done(name: str) -> None:
    RIGHT[name]()


WRONG: dict[str, Callable[[], object]] = {
    "a mask that ends too early": lambda: counting.agree(
        segments(64, 0, 0, 0, 65), u8(128), i64(1, 3), i64(1, 3)
    ),
    "a mask before the first": lambda: counting.agree(
        segments(64, 0, 0, -1, 0), u8(128), i64(1, 3), i64(1, 3)
    ),
    "a row that is not there": lambda: counting.agree(
        segments(64, 1, 0, 0, 64), u8(128), i64(1, 3), i64(1, 3)
    ),
    "too few pairs": lambda: counting.agree(
        segments(64, 0, 0, 0, 64), u8(128), i64(1, 2), i64(1, 3)
    ),
    "a target that is too small": lambda: counting.combine(
        "odd", segments(64, 0, 64, 0, 64), u8(128), 0, u8(64), i64(1)
    ),
    "a base that is longer than masks": lambda: counting.cells(
        "U8", u8(65), u8(8), [0], i64(2, 8, 16)
    ),
    "too few rows": lambda: counting.margins(u8(8), 60, 3, i64(6), i64(10)),
    "a column that is not there": lambda: counting.margins(u8(8), 60, 10, i64(7), i64(10)),
    "a row past the margin": lambda: Profile(10).add(u8(9 + MARGIN), 3, 0, i64(7)),
    "numbers of another kind": lambda: entropy.survey(i64(8)),
    "every second byte": lambda: entropy.survey(u8(64)[::2]),
    "a piece that is too small": lambda: entropy.Coder().encode(
        u8(PIECE - 1), np.ones(1 << 16, np.uint32)
    ),
    "no room for the last word": lambda: sample.draw((1, 2), 0, 100, 9, u8(15)),
    "a mask that may only be read": lambda: sample.draw(
        (1, 2), 0, 8, 9, np.frombuffer(bytes(8), np.uint8)
    ),
    "a frame past the end": lambda: zstd.decode(segments(0, 4, 5), u8(8), u8(64), 64),
    "a target past the end": lambda: zstd.decode(segments(1, 0, 0), u8(8), u8(64), 64),
    "sums that are signed": lambda: ContentHasher().add(i64(2), u8(100), 0, 8),  # type: ignore[arg-type]
    "a side that is too short": lambda: Blend(16)(u8(20), u8(19), u8(2), u8(20), 10),
    "a position past the mask": lambda: compare(512, 64, 0, 0, 0),
    "a slot that is not there": lambda: compare(512, 0, 1, 0, 0),
    "a row of results that is not there": lambda: compare(512, 0, 0, 0, 1),
    "windows of two sizes": lambda: delta.split("16f", [0], u8(512), u8(510), STREAMS),
    "half a lane": lambda: delta.split("16f", [0], u8(511), u8(511), STREAMS),
    "more classes than buffers": lambda: delta.split("16f", [0, 9], u8(512), u8(512), STREAMS),
    "a window that the buffers do not hold": lambda: delta.split(
        "16f", [0], u8(1024), u8(1024), STREAMS
    ),
    "more elements than the window has": lambda: delta.merge(
        "16f", [(0, 257)], 0, u8(512), u8(512), STREAMS
    ),
    "more extra bits than there are": lambda: delta.merge(
        "16f", [(0, 256)], 5000, u8(512), u8(512), STREAMS
    ),
    "too few bins": lambda: delta.tally("16f", u8(512), u8(512), 1, 7, i64(255, 2)),
    "more gaps than there is room for": lambda: delta.gaps(u8(128), 999, 300, 0, GAPS, flip=False),
    "symbols without a margin": lambda: delta.pair(u8(73), 10, u8(32), u8(74)),
    "a tile past the end": lambda: moving.mover(
        "gather", 4, [JOB._replace(tiles=segments(16, 0, 0, 2))]
    ),
    "a compact array that is too small": lambda: moving.mover(
        "gather", 4, [JOB._replace(padding=1)]
    ),
    "places without a margin": lambda: moving.mover("gather", 4, [JOB._replace(places=u8(4))]),
    "no room for wider elements": lambda: widen(u8(20), "BF16", "F32", u8(39)),
    "half an element": lambda: narrow(u8(19), "F32", "BF16", u8(10)),
    "bytes that are numbers": lambda: widen(i64(20), "BF16", "F32", u8(320)),
    "fewer elements than room": lambda: scale(u8(19), BLOCKS, 10, u8(8), 0, u8(80)),
    "elements past the end": lambda: scale(u8(20), BLOCKS, 11, u8(8), 0, u8(80)),
    "elements before the first": lambda: scale(u8(20), BLOCKS, -1, u8(8), 0, u8(80)),
    "a scale too few": lambda: scale(u8(20), BLOCKS, 10, u8(7), 0, u8(80)),
    "scales that begin too late": lambda: scale(u8(20), BLOCKS, 10, u8(8), 1, u8(80)),
    "half a value": lambda: scale(u8(20), BLOCKS, 10, u8(8), 0, u8(79)),
    "elements of 3 bytes": lambda: moving.mover("gather", 3, [JOB]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        WRONG[name]()


def test_addresses_become_arrays_that_are_read() -> None:
    held = np.arange(100, dtype=np.uint8)
    first, second, empty = views(
        np.array([held.ctypes.data + 3, held.ctypes.data + 50, 0]), np.array([4, 2, 0])
    )
    assert (first.tolist(), second.tolist(), len(empty)) == ([3, 4, 5, 6], [50, 51], 0)
    assert not first.flags.writeable
    bytes_at(held.ctypes.data, 1, writable=True)[0] = 77
    assert held[0] == 77

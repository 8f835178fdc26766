"""Bytes of packed versions, in whatever parts they are asked for: those of whole checkpoints."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import write_safetensors

import ckdiff
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas.form import FORMS
from ckdiff.kernels.memory import bytes_at
from ckdiff.runs.timelines.versions import FoldReader, VersionSide, stretch, versions_of

FRAME = FORMS["BF16"].frame // 2  # elements
ELEMENTS = FRAME + FRAME // 4 + 77
SHARES = [(0.02, "packed"), (0.6, "packed"), (0.01, "xor"), (0.0, "packed"), (0.1, "packed")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path, list[Any]]:
    """Checkpoints, the stream that leads through them, and the bytes of the large tensor."""
    folder = tmp_path_factory.mktemp("folding")
    rng = np.random.default_rng(5)
    bits = rng.normal(0, 0.02, ELEMENTS).astype(np.float32).view(np.uint32) >> 16
    content, paths, kept = bits.astype(np.uint16), [], []
    for step in range(len(SHARES) + 1):
        if step:
            moved = rng.random(ELEMENTS) < SHARES[step - 1][0]
            far = rng.integers(0, 1 << 16, ELEMENTS, np.uint16)
            near = content + rng.integers(1, 4, ELEMENTS, np.uint16)
            content = np.where(moved, np.where(rng.random(ELEMENTS) < 0.1, far, near), content)
            content = content.astype(np.uint16)
        path = folder / f"m{step}" / "model.safetensors"
        path.parent.mkdir()
        small = np.full(700, step, np.int8).tobytes()
        large = content.tobytes()
        write_safetensors(path, {"a": ("I8", (700,), small), "w": ("BF16", (ELEMENTS,), large)})
        paths.append(path.parent)
        kept.append(content.view(np.uint8))
    for (_, encoding), one, other in zip(SHARES, paths, paths[1:], strict=False):
        if encoding == "packed":
            ckdiff.delta(one, other, folder / "stream", encoding="packed", as_version=True)
        else:
            ckdiff.delta(one, other, folder / "stream", encoding="xor")
    return paths, folder / "stream", kept


def readers_of(sides: list[Any], window: int) -> list[FoldReader]:
    found: list[FoldReader] = []
    for side in sides[1:]:
        assert isinstance(side, VersionSide)
        earlier = found[-1].stretch if found else partial(stretch, sides[0])
        found.append(FoldReader([side.version], side, window, None, earlier))
    return found


@pytest.mark.parametrize("start", [0, 512, 1_000_448, FRAME - 512, FRAME, FRAME + 512])
def test_parts_are_those_of_the_checkpoints(
    run: tuple[list[Path], Path, list[Any]], start: int
) -> None:
    paths, stream, kept = run
    rng = np.random.default_rng(start)
    with ExitStack() as stack:
        sides: list[Any] = versions_of(stack, [paths[0], stream], None, None)
        window = 1 << 20
        readers = readers_of(sides, window)
        for reader in readers:
            stack.callback(reader.close)
        tensor = np.array([sides[0].table.names.index("w")])
        at = start
        while at < ELEMENTS:
            size = min(512 * int(rng.integers(1, window // 1024 + 1)), ELEMENTS - at)
            whole = kept[0][2 * at : 2 * (at + size)].copy()
            addresses = np.array([whole.ctypes.data])
            for reader, wanted in zip(readers, kept[1:], strict=True):
                spans = tensor, np.array([2 * at]), np.array([2 * size])
                addresses = reader.acquire(addresses, *spans)
                found = bytes_at(int(addresses[0]), 2 * size)
                assert (found == wanted[2 * at : 2 * (at + size)]).all()
            for reader in readers:
                reader.release()
            at += size


def test_several_versions_are_one_step(run: tuple[list[Path], Path, list[Any]]) -> None:
    paths, stream, kept = run
    with ExitStack() as stack:
        sides: list[Any] = versions_of(stack, [paths[0], stream], None, None)
        base: Checkpoint = sides[0]
        steps = [side.version for side in sides[1:]]
        reader = FoldReader(steps, sides[-1], 1 << 20, base.reader(), partial(stretch, base))
        stack.callback(reader.close)
        tensor = np.array([base.table.names.index("w")])
        for at in range(2 * 512 * 3, len(kept[0]), 1 << 20):
            size = min(1 << 20, len(kept[0]) - at)
            address = reader.acquire(np.array([0]), tensor, np.array([at]), np.array([size]))
            assert (bytes_at(int(address[0]), size) == kept[-1][at : at + size]).all()
            reader.release()
        assert (reader.stretch(int(tensor[0]), 0, 5000 * 128) == kept[-1][: 5000 * 128]).all()

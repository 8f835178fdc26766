"""Tensors whose columns are in several files: compared row by row, as if they were in one."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import ckdiff
from ckdiff.checkpoints.gathering import PieceReader
from ckdiff.checkpoints.opening import open_local
from ckdiff.checkpoints.scattered import Rows
from ckdiff.diffs import task
from ckdiff.diffs.rows import cut_in_rows
from ckdiff.kernels import abi
from ckdiff.kernels.memory import bytes_at

Tensors = dict[str, npt.NDArray[Any]]
Cuts = dict[str, list[int]]  # of each tensor where its columns are cut


def write(folder: Path, tensors: Tensors, cuts: Cuts) -> Path:
    """A file for each part of the columns, as torch's writer for Hugging Face names them."""
    folder.mkdir(parents=True)
    files: list[tuple[Tensors, dict[str, Any]]] = []
    for name, tensor in tensors.items():
        edges = [0, *cuts.get(name, []), tensor.shape[-1]]
        for i, (low, high) in enumerate(pairwise(edges)):
            while len(files) <= i:
                files.append(({}, {}))
            files[i][0][name] = np.ascontiguousarray(tensor[..., low:high])
            files[i][1][name] = {"saved_offsets": [0] * (tensor.ndim - 1) + [low]}
    for i, (parts, said) in enumerate(files, 1):
        path = folder / f"shard-{i:05d}-model-00001-of-00001.safetensors"
        save_file(parts, path, {"DCP_SHARDING_INFO": json.dumps(said)})
    return folder


def pair_of() -> tuple[Tensors, Tensors]:
    rng = np.random.default_rng(5)
    shapes = {"a.w": (9, 2048), "b.odd": (7, 1500), "c.stack": (2, 3, 1536), "d.line": (1, 4096),
              "e.whole": (3, 700), "f.bias": (1030,)}  # fmt: skip
    base: Tensors = {
        name: rng.integers(0, 1 << 16, shape).astype(np.uint16) for name, shape in shapes.items()
    }
    base["g.wide"] = rng.standard_normal((5, 3072)).astype(np.float32)
    tuned = {name: tensor.copy() for name, tensor in base.items()}
    for name in ("a.w", "b.odd", "c.stack", "g.wide"):
        where = rng.random(tuned[name].shape) < 0.1
        tuned[name][where] += 1
    return base, tuned


#: ways of cutting: at units, at others, and both
WAYS: list[Cuts] = [
    {"a.w": [512, 1024], "b.odd": [512], "c.stack": [512, 1024], "g.wide": [1024, 2048]},
    {"a.w": [1024], "c.stack": [1024], "d.line": [512], "g.wide": [512]},
    {"a.w": [500], "b.odd": [750], "c.stack": [512, 1000], "g.wide": [1025]},
]


@pytest.mark.parametrize("base_way", [None, 0, 1, 2])
@pytest.mark.parametrize("tuned_way", [0, 1, 2])
def test_a_diff_is_that_of_whole_tensors(
    tmp_path: Path, base_way: int | None, tuned_way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts, hashes and masks; of the ways with units some rows are not gathered."""
    base, tuned = pair_of()
    whole = [write(tmp_path / f"whole-{i}", side, {}) for i, side in enumerate((base, tuned))]
    way = {} if base_way is None else WAYS[base_way]
    sides = [write(tmp_path / "base", base, way), write(tmp_path / "tuned", tuned, WAYS[tuned_way])]
    cut: list[int] = []

    def noted(segments: Any, *rest: Any) -> Any:
        found = cut_in_rows(segments, *rest)
        cut.append(len(found) - len(segments))
        return found

    wanted = ckdiff.diff(whole[0], whole[1], tmp_path / "wanted", workers=1)
    monkeypatch.setattr(task, "cut_in_rows", noted)
    found = ckdiff.diff(sides[0], sides[1], tmp_path / "found", workers=1)
    assert any(cut) == bool({base_way, tuned_way} & {0, 1})
    assert found.to_dict()["rules"] == wanted.to_dict()["rules"]
    mine, theirs = found.table, wanted.table
    assert mine.names == theirs.names
    assert mine.changed["exact"].tolist() == theirs.changed["exact"].tolist()
    assert list(mine.base_hashes) == list(theirs.base_hashes)
    assert list(mine.tuned_hashes) == list(theirs.tuned_hashes)
    assert found.store is not None
    assert wanted.store is not None
    for name in wanted.table.names:
        assert np.array_equal(found.store.mask(name), wanted.store.mask(name)), name


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_rows_are_what_would_be_gathered(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, _ = pair_of()
    folder = write(tmp_path_factory.mktemp("rows") / "x", base, data.draw(st.sampled_from(WAYS)))
    with open_local(folder) as checkpoint:
        sizes = checkpoint.table.nbytes.tolist()
        tensor = st.integers(0, len(sizes) - 1)
        spans = []
        for at in data.draw(st.lists(tensor, min_size=1, max_size=4)):
            start = data.draw(st.one_of(st.integers(0, sizes[at]), st.just(0), st.just(2048)))
            start = min(start, sizes[at])
            spans.append((at, start, data.draw(st.integers(0, sizes[at] - start))))
        columns = [np.array(column, np.int64) for column in zip(*spans, strict=True)]
        with closing(checkpoint.reader()) as reader:
            assert isinstance(reader, PieceReader)
            places = reader.acquire(*columns).tolist()
            wanted = [bytes_at(a, n).tobytes() for a, (_, _, n) in zip(places, spans, strict=True)]
            reader.release()
            reader.give_rows()
            if data.draw(st.booleans()):
                reader.prefetch(*columns)
            places = reader.acquire(*columns).tolist()
            for i, (address, (_, _, size)) in enumerate(zip(places, spans, strict=True)):
                assert _bytes(i, address, size, reader.rows) == wanted[i]
            reader.release()


def _bytes(span: int, address: int, size: int, rows: Rows | None) -> bytes:
    if address or not size:
        return bytes_at(address, size).tobytes()
    assert rows is not None
    mine = rows.spans == span
    begins, addresses = rows.begins[mine].tolist(), rows.addresses[mine].tolist()
    assert begins[0] == 0
    ends = [*begins[1:], size]
    return b"".join(
        bytes_at(at, end - begin).tobytes()
        for at, begin, end in zip(addresses, begins, ends, strict=True)
    )


def test_a_side_without_rows_is_cut_as_well() -> None:
    """Two segments, the first of which is in rows on one side."""
    segments = np.zeros((2, abi.SEG_COLUMNS), np.int64)
    segments[:, abi.SEG_BASE], segments[:, abi.SEG_TUNED] = (0, 9000), (50_000, 70_000)
    segments[:, abi.SEG_ELEMENTS], segments[:, abi.SEG_POSITION] = (1500, 100), (512, 2048)
    segments[:, abi.SEG_UNIT], segments[:, abi.SEG_ROW] = (3, 0), (4, 5)
    rows = Rows(*(np.array(x, np.int64) for x in ([0, 0], [0, 2048], [1000, 7000])))
    bits = [np.array([16, 16]), np.array([32, 8])]
    found = cut_in_rows(segments, [rows, None], bits)
    wanted = [
        [1000, 50_000, 1024, 512, 0, 3, 4],
        [7000, 54_096, 476, 1536, 0, 5, 4],
        [9000, 70_000, 100, 2048, 0, 0, 5],
    ]
    assert found.tolist() == wanted
    assert cut_in_rows(segments, [None, None], bits) is segments

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
from ckdiff.checkpoints.strips import NO_GRIDS, rows_of
from ckdiff.diffs import task
from ckdiff.diffs.rows import cut_in_rows, row_by_row
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
        found: Any = row_by_row(segments, *rest)
        cut.append(len(found) - len(segments))
        return found

    wanted = ckdiff.diff(whole[0], whole[1], tmp_path / "wanted", workers=1)
    monkeypatch.setattr(task, "row_by_row", noted)
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
            shapes = [checkpoint.table.shapes[at] for at, _, _ in spans]
            elements = np.array([np.prod(shape) for shape in shapes], np.int64)
            width = checkpoint.table.nbytes[columns[0]] // elements
            rows = rows_of(reader.grids, columns[1] // width, 8 * width)
            for i, (address, (_, _, size)) in enumerate(zip(places, spans, strict=True)):
                assert _bytes(i, address, size, rows) == wanted[i]
            reader.release()


def _bytes(span: int, address: int, size: int, rows: Rows) -> bytes:
    if address or not size:
        return bytes_at(address, size).tobytes()
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
    assert row_by_row(segments, [NO_GRIDS, NO_GRIDS], [rows, None], bits).tolist() == wanted
    assert row_by_row(segments, [NO_GRIDS, NO_GRIDS], [None, None], bits) is segments


@pytest.mark.parametrize("way", ["rows on both sides", "other rows", "the middle"])
def test_a_side_that_is_cut_across_other_dimensions(tmp_path: Path, way: str) -> None:
    """A stack whose columns are in two files, beside one whose matrices are cut in rows as well."""
    rng = np.random.default_rng(3)
    sides = [rng.integers(0, 9, (4, 6, 1024)).astype(np.uint16) for _ in range(2)]
    sides[1] = np.where(rng.random(sides[0].shape) < 0.9, sides[0], sides[1])
    boxes = {
        "rows on both sides": [(slice(0, 4), slice(a, a + 3)) for a in (0, 3)],
        "other rows": [(slice(a, a + 2), slice(0, 6)) for a in (0, 2)],
        "the middle": [(slice(0, 4), slice(0, 1)), (slice(0, 4), slice(1, 6))],
    }
    folders = []
    for i, side in enumerate(sides):
        whole = tmp_path / f"whole-{i}"
        whole.mkdir()
        save_file({"w": side}, whole / "model.safetensors")
        folder = tmp_path / f"cut-{i}"
        folder.mkdir()
        columns = (
            [slice(0, 512), slice(512, 1024)] if i or way != "the middle" else [slice(0, 1024)]
        )
        some = boxes[way] if i else [(slice(0, 4), slice(0, 6))]
        parts = [(*box, column) for box in some for column in columns]
        for n, box in enumerate(parts, 1):
            path = folder / f"shard-{n:05d}-model-00001-of-00001.safetensors"
            said = {"w": {"saved_offsets": [each.start for each in box]}}
            part = np.ascontiguousarray(side[box])
            save_file({"w": part}, path, {"DCP_SHARDING_INFO": json.dumps(said)})
        folders += [whole, folder]
    wanted = ckdiff.diff(folders[0], folders[2], tmp_path / "wanted", workers=1)
    found = ckdiff.diff(folders[1], folders[3], tmp_path / "found", workers=1)
    assert list(found.table.base_hashes) == list(wanted.table.base_hashes)
    assert list(found.table.tuned_hashes) == list(wanted.table.tuned_hashes)
    assert wanted.table.changed["exact"].tolist() == [int((sides[0] != sides[1]).sum())]
    assert found.table.changed["exact"].tolist() == wanted.table.changed["exact"].tolist()
    assert found.store is not None
    assert wanted.store is not None
    assert np.array_equal(found.store.mask("w"), wanted.store.mask("w"))

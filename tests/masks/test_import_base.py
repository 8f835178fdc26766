"""Masks imported with a base: its content hashes are those of any diff, and read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from safetensors.numpy import save_file
from support import write_safetensors

import ckdiff
from ckdiff.checkpoints.places.mapped import MappedReader
from ckdiff.masks.importing import contenthashes
from ckdiff.options import Observer, Progress

SIZES = {"U8": 8, "BF16": 16, "F4": 4, "F64": 64, "BOOL": 8, "F8_E4M3": 8, "C64": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    tensors: dict[str, Any] = {"empty": ("F32", (0,), b""), "scalar": ("F32", (), bytes(4))}
    for dtype, bits in SIZES.items():
        for elements in (2, 512, 70_002):
            values = rng.integers(0, 2, elements * bits // 8, np.uint8)
            tensors[f"{dtype}.{elements}"] = (dtype, (elements,), values)
    folder = tmp_path_factory.mktemp("base")
    names = list(tensors)
    for i in range(2):
        write_safetensors(folder / f"{i}.safetensors", {n: tensors[n] for n in names[i::2]})
    return folder


def hashes_of(base: Path) -> dict[str, str]:
    table = ckdiff.diff(base, base, verify=True, scheduler="threads").table
    return {record.name: record.base_hash for record in table}


@pytest.mark.parametrize("chunk", [None, 4096])
def test_hashes_are_those_of_a_diff(
    base: Path, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = hashes_of(base)
    if chunk is not None:
        monkeypatch.setattr("ckdiff.layout.CHUNK", chunk)
        monkeypatch.setattr(contenthashes, "_WINDOW", 512)
    seen: list[Progress] = []
    read: list[int] = []
    acquire = MappedReader.acquire

    def counted(self: Any, tensors: Any, starts: Any, nbytes: Any) -> Any:
        read.append(int(nbytes.sum()))
        return acquire(self, tensors, starts, nbytes)

    monkeypatch.setattr(MappedReader, "acquire", counted)
    with ckdiff.open_checkpoint(base) as checkpoint:
        some = list(wanted)[1:]
        found = contenthashes.content_hashes(checkpoint, some, Observer(progress=seen.append))
        total = sum(
            size
            for name, size in zip(checkpoint.table.names, checkpoint.table.nbytes, strict=True)
            if name in some
        )
    assert found == {name: wanted[name] for name in some}
    assert sum(read) == seen[-1].done == seen[-1].total == total


def test_an_active_dask_client_is_not_asked(base: Path, tmp_path: Path) -> None:
    file, name = tmp_path / "masks.safetensors", "U8.512"
    save_file({name: np.arange(512) % 3 == 0}, file)
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None):
        store = ckdiff.import_masks(file, tmp_path / "out.zarr", base=base)
    assert {r.name: r.base_hash for r in store.tensors} == {name: hashes_of(base)[name]}
    assert store.tensors[0].changed["exact"] == 171

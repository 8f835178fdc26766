"""``ckdiff export``: every bit under the right name, and all of it or nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import error, ok, stopped_at_the_end
from derived_stores import first_bits
from exported_masks import ORDER, SHAPES, Flags, shards
from mask_stores import make_store, random_base
from safetensors import numpy as safetensors_numpy
from support import write_index, write_safetensors

import ckdiff
from ckdiff.checkpoints.opening import open_local
from ckdiff.masks.exporting.masks import Masks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ckdiff.MaskStore, Flags]:
    rng = np.random.default_rng(0)
    masks = {name: rng.random(shape) < 0.2 for name, (_, shape) in SHAPES.items()}
    masks["scalar"] = np.array(True)
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder / "run.zarr", random_base(rng, SHAPES), masks), masks


def header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    found: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return found


def same(found: Any, wanted: Flags) -> None:
    assert set(found) == set(wanted)
    for name, mask in wanted.items():
        assert found[name].dtype == np.bool_
        assert found[name].shape == mask.shape
        assert np.array_equal(found[name], mask), name


@pytest.mark.parametrize("invert", [False, True])
def test_safetensors(invert: bool, made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path) -> None:
    store, masks = made
    out = tmp_path / "masks.safetensors"
    result = ckdiff.export_masks(store, out, invert=invert)
    wanted = {name: mask ^ invert for name, mask in masks.items()}
    same(safetensors_numpy.load_file(out), wanted)
    assert list(header(out))[1:] == ORDER
    data = header(out)["__metadata__"]
    assert data["format"] == "ckdiff-masks"
    assert data["polarity"] == ("1 = frozen" if invert else "1 = changed")
    assert (data["rule"], data["encoding"]) == ("exact", "bool")
    assert data["store"] == store.manifest_digest() == result["store"]
    assert (data["base"], data["tuned"]) == ("base/model.safetensors", "tuned/model.safetensors")
    assert json.loads(data["tensors"])["layers.10.w"] == ["BF16", [33, 100]]
    assert result["ones"] == sum(int(mask.sum()) for mask in wanted.values())
    assert os.listdir(tmp_path) == ["masks.safetensors"]
    again = tmp_path / "again.safetensors"
    ckdiff.export_masks(store, again, invert=invert)
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("invert", [False, True])
def test_packed(invert: bool, made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path) -> None:
    store, masks = made
    out = tmp_path / "masks.safetensors"
    ckdiff.export_masks(store, out, packed=True, invert=invert)
    found = safetensors_numpy.load_file(out)
    for name, mask in masks.items():
        wanted = np.packbits((mask ^ invert).ravel(), bitorder="little")
        assert np.array_equal(found[name], wanted), name
    assert header(out)["__metadata__"]["encoding"] == "packed"


@pytest.mark.parametrize("invert", [False, True])
def test_indices(invert: bool, made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path) -> None:
    store, masks = made
    out = tmp_path / "masks.safetensors"
    ckdiff.export_masks(store, out, to="indices", invert=invert)
    found = safetensors_numpy.load_file(out)
    assert set(found) == {f"{name}.indices" for name in masks}
    for name, mask in masks.items():
        assert found[f"{name}.indices"].dtype == np.int32
        assert np.array_equal(found[f"{name}.indices"], np.flatnonzero(mask ^ invert)), name


def test_wide_indices_come_first_in_the_file(
    made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckdiff.masks.exporting.indices._NARROW", 1000)
    store, masks = made
    out = tmp_path / "masks.safetensors"
    ckdiff.export_masks(store, out, to="indices")
    found = safetensors_numpy.load_file(out)
    for name, mask in masks.items():
        assert found[f"{name}.indices"].dtype == (np.int64 if mask.size >= 1000 else np.int32)
        assert np.array_equal(found[f"{name}.indices"], np.flatnonzero(mask)), name
    entries = header(out)
    assert list(entries)[1:] == [f"{name}.indices" for name in ORDER]
    wide = [e["data_offsets"][0] for n, e in entries.items() if e.get("dtype") == "I64"]
    assert wide
    assert all(begin % 8 == 0 for begin in wide)


def test_npz(made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path) -> None:
    store, masks = made
    out = tmp_path / "masks.npz"
    ckdiff.export_masks(store, out, to="npz")
    with np.load(out, allow_pickle=False) as archive:
        found = {name: archive[name] for name in archive.files}
    data = json.loads(found.pop("__metadata__").tobytes())
    assert (data["format"], data["polarity"]) == ("ckdiff-masks", "1 = changed")
    same(found, masks)


def test_torch(made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path) -> None:
    import torch

    store, masks = made
    out = tmp_path / "masks.pt"
    ckdiff.export_masks(store, out, to="torch", invert=True)
    found = torch.load(out, weights_only=True)
    assert found["metadata"]["polarity"] == "1 = frozen"
    same({name: t.numpy() for name, t in found["masks"].items()}, {n: ~m for n, m in masks.items()})
    assert os.listdir(tmp_path) == ["masks.pt"]


@pytest.mark.parametrize("to", ["safetensors", "indices"])
def test_like_a_sharded_checkpoint(
    to: str, made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path
) -> None:
    store, masks = made
    out = tmp_path / "masks"
    result = ckdiff.export_masks(store, out, to=to, like=shards(tmp_path / "model"))
    assert result["left_out"] == ["other.1", "other.2"]
    names = ["model-1.safetensors", "model-2.safetensors"]
    assert result["files"] == names
    assert sorted(os.listdir(out)) == [*names, "model.safetensors.index.json"]
    with open_local(out, of_ours=True) as checkpoint:  # the index is the truth
        assert len(checkpoint.table) == len(masks)
    found = {k: v for name in names for k, v in safetensors_numpy.load_file(out / name).items()}
    if to == "safetensors":
        same(found, masks)
    else:
        assert np.array_equal(found["large.indices"], np.flatnonzero(masks["large"]))


def test_like_a_single_file(made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path) -> None:
    store, masks = made
    model = tmp_path / "model.safetensors"
    content = {n: ("U8", s, bytes(int(np.prod(s)))) for n, (_, s) in SHAPES.items()}
    write_safetensors(model, content)
    ckdiff.export_masks(store, tmp_path / "out.safetensors", like=model)
    same(safetensors_numpy.load_file(tmp_path / "out.safetensors"), masks)
    assert "replace a source" in error(
        "export", str(store.path), "-o", str(model), "--like", str(model), "--overwrite"
    )


def test_like_another_model(made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path) -> None:
    model = shards(tmp_path / "model")
    export = ("export", str(made[0].path), "--like", str(model), "-o")
    write_safetensors(model / "model-1.safetensors", {"scalar": ("U8", (1,), b"1")})
    write_index(model, {"scalar": "model-1.safetensors"})
    assert "lacks 5 of the store's tensors, such as bytes" in error(*export, str(tmp_path / "out"))
    content = {n: ("U8", (*s, 1), bytes(int(np.prod(s)))) for n, (_, s) in SHAPES.items()}
    write_safetensors(model / "model-1.safetensors", content)
    write_index(model, dict.fromkeys(content, "model-1.safetensors"))
    assert "has the shape [5, 3, 1, 1]" in error(*export, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_an_output_is_replaced_only_when_asked(
    made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path
) -> None:
    store, masks = made
    path = str(store.path)
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    for overwrite in ([], ["--overwrite"]):
        assert "is not a file of exported masks" in error(
            "export", path, "-o", str(out), *overwrite
        )
        assert out.read_text() == "mine"
    out.unlink()
    ok("export", path, "-o", str(out), "--invert")
    assert "use --overwrite" in error("export", path, "-o", str(out))
    ok("export", path, "-o", str(out), "--overwrite")
    same(safetensors_numpy.load_file(out), masks)
    link = tmp_path / "link"
    link.symlink_to(out)
    assert "is not a file" in error("export", path, "-o", str(link), "--overwrite")
    assert "no directory" in error("export", path, "-o", str(tmp_path / "no" / "out"))
    for inside in (store.path, store.path / "x", store.path.parent):
        assert error("export", path, "-o", str(inside), "--overwrite")
    ckdiff.check_store(store.path)
    like = ["--like", str(shards(tmp_path / "model"))]
    folder = tmp_path / "folder"
    ok("export", path, "-o", str(folder), *like)
    assert "use --overwrite" in error("export", path, "-o", str(folder), *like)
    ok("export", path, "-o", str(folder), *like, "--overwrite", "--invert")
    found = safetensors_numpy.load_file(folder / "model-2.safetensors")
    assert np.array_equal(found["large"], ~masks["large"])
    (folder / "notes.txt").write_text("mine")
    words = "holds notes.txt, which is not a file of exported masks"
    assert words in error("export", path, "-o", str(folder), *like, "--overwrite")
    assert (folder / "notes.txt").exists()
    assert not list(tmp_path.glob("*.ckdiff-partial"))


def stop_after(pieces: int, failure: BaseException) -> Callable[..., object]:
    whole = Masks.pieces

    def stopped(self: Masks, chosen: Any) -> Any:
        for i, piece in enumerate(whole(self, chosen)):
            if i == pieces:
                raise failure
            yield piece

    return stopped


@pytest.mark.parametrize("to", ["safetensors", "indices", "npz", "torch"])
@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (OSError(28, "No space left on device"), ckdiff.OutputError, "No space left"),
        (KeyboardInterrupt(), ckdiff.Interrupted, "interrupted"),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_what_fails_leaves_nothing(
    to: str,
    failure: BaseException,
    kind: type[Exception],
    words: str,
    made: tuple[ckdiff.MaskStore, Flags],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Masks, "pieces", stop_after(3, failure))
    with pytest.raises(kind, match=words):
        ckdiff.export_masks(made[0], tmp_path / "out", to=to)
    assert os.listdir(tmp_path) == []


def test_a_killed_export_leaves_nothing_under_the_name(
    made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path
) -> None:
    store, masks = made
    out = tmp_path / "out.safetensors"
    arguments = ["export", str(store.path), "-o", str(out)]
    stopped_at_the_end(signal.SIGKILL, *arguments)
    assert os.listdir(tmp_path) == ["out.safetensors.ckdiff-partial"]
    ok(*arguments)
    assert os.listdir(tmp_path) == ["out.safetensors"]
    same(safetensors_numpy.load_file(out), masks)
    stopped_at_the_end(signal.SIGKILL, *arguments, "--overwrite")
    same(safetensors_numpy.load_file(out), masks)
    ok("clean", str(tmp_path))
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_a_store_that_lies_is_noticed(tmp_path: Path) -> None:
    first_bits(tmp_path / "run.zarr", {"a": (1001, 7)}, padding=True)
    out = tmp_path / "out"
    assert "padding bits" in error("export", str(tmp_path / "run.zarr"), "-o", str(out))
    assert not out.exists()


def test_rules_and_wrong_arguments(tmp_path: Path) -> None:
    store = first_bits(tmp_path / "run.zarr", {"a": (10, 7)}, rule="ulp=1")
    out = tmp_path / "out"
    ckdiff.export_masks(store, out, rule="ulp=1")
    data = header(out)["__metadata__"]
    assert data["rule"] == "ulp=1"
    assert json.loads(data["made_by"]) == {"operation": "test"}
    assert "base" not in data
    path = str(store.path)
    assert "no mask for the rule exact" in error("export", path, "--rule", "exact", "-o", "x")
    assert "packed" in error("export", path, "--packed", "--to", "npz", "-o", "x")
    assert "shards" in error("export", path, "--like", path, "--to", "torch", "-o", "x")
    assert "no store" in error("export", str(tmp_path / "none"), "-o", "x")
    with pytest.raises(ckdiff.UsageError, match="no format"):
        ckdiff.export_masks(store, out, to="gguf")  # type: ignore[arg-type]
    with pytest.raises(ckdiff.UsageError, match="invert"):
        ckdiff.export_masks(store, out, invert="no")  # type: ignore[arg-type]


def test_the_command(made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path) -> None:
    store, masks = made
    out = str(tmp_path / "out")
    elements = sum(mask.size for mask in masks.values())
    ones = sum(int(mask.sum()) for mask in masks.values())
    lines = ok("export", str(store.path), "-o", out).stdout.splitlines()
    assert lines[0].startswith(f"{elements:,} elements in 6 tensors, 1 = changed: {ones:,} ones, ")
    assert lines[1] == f"written to {out}"
    options = ["--packed", "--overwrite", "--json"]
    found = json.loads(ok("export", str(store.path), "-o", out, *options).stdout)
    assert (found["packed"], found["ones"], found["files"]) == (True, ones, ["out"])

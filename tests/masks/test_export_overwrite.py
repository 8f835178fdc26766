"""``export --overwrite`` replaces what an export made, told by its content, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import error, ok
from mask_files import mapping, notes, npy, pickled, tensor, text, torch_bytes
from mask_stores import make_store, random_base
from support import write_index, write_safetensors

import ckdiff
from ckdiff.cli.formats import percent
from ckdiff.masks.exporting import recognising

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "layers.2.w": ("BF16", (33, 10)),
    "layers.10.w": ("BF16", (700,)),
    "empty": ("BF16", (0, 3)),
}
FORMATS = ["safetensors", "packed", "indices", "npz", "torch"]
BYTES = {"model-1.safetensors": ["empty", "layers.2.w"], "model-2.safetensors": ["layers.10.w"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ckdiff.MaskStore:
    rng = np.random.default_rng(0)
    masks = {name: rng.random(shape) < 0.2 for name, (_, shape) in SHAPES.items()}
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder / "run.zarr", random_base(rng, SHAPES), masks)


def export(store: ckdiff.MaskStore, out: Path, form: str, **options: Any) -> dict[str, Any]:
    to: Any = "safetensors" if form == "packed" else form
    return ckdiff.export_masks(store, out, to=to, packed=form == "packed", **options)


@pytest.mark.parametrize("now", FORMATS)
@pytest.mark.parametrize("before", FORMATS)
def test_an_export_replaces_an_export(
    before: str, now: str, store: ckdiff.MaskStore, tmp_path: Path
) -> None:
    out = tmp_path / "masks"
    export(store, out, before, invert=True)
    old = out.read_bytes()
    with pytest.raises(ckdiff.OutputError, match="exists") as caught:
        export(store, out, now)
    assert caught.value.hint == "use --overwrite to replace it"
    assert out.read_bytes() == old
    export(store, out, now, overwrite=True)
    assert out.read_bytes() != old
    assert recognising.foreign(out) is None
    assert os.listdir(tmp_path) == ["masks"]


def test_exports_of_former_versions_are_known() -> None:
    data = Path(__file__).parents[1] / "data"
    found = [p for p in data.rglob("masks*") if p.suffix in (".safetensors", ".npz", ".pt")]
    assert len(found) >= 5
    assert [path for path in found if recognising.exported(path) is None] == []


def export_then(change: Callable[[Path], None], form: str) -> Callable[..., None]:
    def make(path: Path, store: ckdiff.MaskStore) -> None:
        export(store, path, form)
        change(path)

    return make


def flags(**masks: Any) -> dict[str, Any]:
    return {"a": np.ones(8, bool)} | masks


def torch_save(content: Any) -> Callable[..., None]:
    def make(path: Path, store: ckdiff.MaskStore) -> None:
        import torch

        torch.save(content(torch), path)

    return make


def npz(path: Path, **arrays: Any) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def add_array(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("mine.npy", npy(np.ones(3, bool)))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


TOLD = np.frombuffer(json.dumps(notes({"a": ["BF16", [8]]})).encode(), np.uint8)
CODE = b"cos\nmkdir\n" + text("bomb") + b"\x85R"
FOREIGN: dict[str, Callable[..., object]] = {
    "weights": lambda p, s: write_safetensors(p, {"a": ("F32", (2,), bytes(8))}),
    "weights that lie": lambda p, s: write_safetensors(
        p, {"a": ("F32", (2,), bytes(8))}, notes({"a": ["F32", [2]]})
    ),
    "masks by another": lambda p, s: write_safetensors(p, {"a": ("BOOL", (8,), bytes(8))}),
    "nearly ours": lambda p, s: write_safetensors(
        p, {"a": ("BOOL", (8,), bytes(8))}, notes({"a": ["F32", [8]]}) | {"format": "ckdiff-mask"}
    ),
    "more than ours": lambda p, s: write_safetensors(
        p,
        {"a": ("BOOL", (8,), bytes(8)), "b": ("BOOL", (8,), bytes(8))},
        notes({"a": ["F32", [8]]}),
    ),
    "less than ours": lambda p, s: write_safetensors(
        p, {"a": ("BOOL", (8,), bytes(8))}, notes({"a": ["F32", [8]], "b": ["F32", [8]]})
    ),
    "npz": lambda p, s: npz(p, **flags()),
    "npz of weights": lambda p, s: npz(p, w=np.ones(3)),
    "npz of ours and weights": lambda p, s: npz(p, **flags(w=np.ones(3)), __metadata__=TOLD),
    "npz of ours and more": export_then(add_array, "npz"),
    "torch": torch_save(lambda t: {"a": t.ones(8, dtype=t.bool)}),
    "torch of weights": torch_save(lambda t: {"a": t.ones(8)}),
    "torch of masks": torch_save(lambda t: {"masks": {"a": t.ones(8, dtype=t.bool)}}),
    "torch of ours and more": torch_save(
        lambda t: {
            "masks": {"a": t.ones(8, dtype=t.bool)},
            "metadata": notes({"a": ["F32", [8]]}),
            "optimizer": {"step": 3},
        }
    ),
    "torch of code": lambda p, s: p.write_bytes(
        torch_bytes(
            pickled(mapping({"masks": mapping({"a": tensor("0", 8, [8])}), "metadata": CODE})),
            {"0": bytes(8)},
        )
    ),
    **{f"cut {form}": export_then(cut, form) for form in FORMATS},
    "empty": lambda p, s: p.write_bytes(b""),
    "text": lambda p, s: p.write_text("ckdiff-masks"),
    "json": lambda p, s: p.write_text(json.dumps(notes({}))),
    "index": lambda p, s: (
        write_index(p.parent, {"a": "a.safetensors"}, p.name),
        write_safetensors(
            p.parent / "a.safetensors", {"a": ("BOOL", (8,), bytes(8))}, notes({"a": ["U8", [8]]})
        ),
    ),
}


@pytest.mark.parametrize("name", ["masks", "m.safetensors.index.json"])
@pytest.mark.parametrize("case", FOREIGN)
def test_nothing_else_is_replaced(
    case: str, name: str, store: ckdiff.MaskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / name
    FOREIGN[case](out, store)
    before, there = out.read_bytes(), sorted(os.listdir(tmp_path))
    for form in FORMATS:
        for overwrite in (False, True):
            with pytest.raises(ckdiff.OutputError, match="is not a file of exported masks"):
                export(store, out, form, overwrite=overwrite)
    assert out.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == there


def test_what_is_no_file_is_not_replaced(store: ckdiff.MaskStore, tmp_path: Path) -> None:
    export(store, tmp_path / "ours", "npz")
    (tmp_path / "link").symlink_to("ours")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    shutil.copytree(store.path, tmp_path / "store")
    there = sorted(os.listdir(tmp_path))
    for name in ("link", "pipe", "folder", "store"):
        with pytest.raises(ckdiff.OutputError):
            export(store, tmp_path / name, "npz", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == there
    ckdiff.check_store(tmp_path / "store")


# -- directories -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for file, names in BYTES.items():
        shapes = {name: SHAPES[name][1] for name in names}
        write_safetensors(
            folder / file, {n: ("U8", s, bytes(int(np.prod(s)))) for n, s in shapes.items()}
        )
    write_index(folder, {name: file for file, names in BYTES.items() for name in names})
    return folder


def plant(name: str, content: bytes = b"mine") -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)

    return change


def link_inside(out: Path) -> None:
    (out / "link.safetensors").symlink_to(out / "model-1.safetensors")


def link_folder(out: Path) -> None:
    (out / "elsewhere").symlink_to(out.parent)


def own_shard(out: Path) -> None:
    shutil.copy(out / "model-1.safetensors", out.parent / "kept.safetensors")
    (out / "model-1.safetensors").unlink()
    (out / "model-1.safetensors").symlink_to(out.parent / "kept.safetensors")


def another_index(out: Path) -> None:
    write_index(out, {"layers.2.w": "model-1.safetensors"})


INDEX = "model.safetensors.index.json"
PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "notes": (plant("notes.txt"), "notes.txt"),
    "hidden": (plant(".git"), ".git"),
    "weights": (
        lambda out: write_safetensors(out / "w.safetensors", {"a": ("F32", (1,), bytes(4))}),
        "w.safetensors",
    ),
    "deeper": (plant("a/b/notes.txt"), "a/b/notes.txt"),
    "an empty directory": (lambda out: (out / "a").mkdir(), "a, a directory"),
    "a link": (link_inside, "link.safetensors"),
    "a link to a directory": (link_folder, "elsewhere"),
    "a shard that is a link": (own_shard, "model-1.safetensors"),
    "a pipe": (lambda out: os.mkfifo(out / "pipe"), "pipe"),
    "another index": (another_index, f"{INDEX}, which is not the index"),
    "no index": (lambda out: (out / INDEX).unlink(), f"no {INDEX}"),
    "an index of nothing": (plant(INDEX, b"{}"), INDEX),
    "a shard is gone": (lambda out: (out / "model-1.safetensors").unlink(), INDEX),
    "a shard is cut": (lambda out: cut(out / "model-2.safetensors"), "model-2.safetensors"),
    "another export": (
        lambda out: shutil.copy(out / "model-1.safetensors", out / "mine.safetensors"),
        "model-1.safetensors, which has masks that another file has too",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
@pytest.mark.parametrize("form", ["safetensors", "indices"])
def test_a_directory_is_replaced_if_all_of_it_was_exported(
    form: str, case: str, store: ckdiff.MaskStore, like: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(store, out, form, like=like)
    export(store, out, "packed", like=like, overwrite=True)
    export(store, out, form, like=like, overwrite=True)
    change, words = PLANTED[case]
    change(out)
    before = {p: p.lstat().st_mtime_ns for p in sorted(out.rglob("*"))}
    arguments = ["export", str(store.path), "--like", str(like), "-o", str(out), "--to", form]
    assert words in error(*arguments, "--overwrite")
    assert {p: p.lstat().st_mtime_ns for p in sorted(out.rglob("*"))} == before
    assert not out.with_name("out.ckdiff-partial").exists()


def test_a_checkpoint_or_a_store_is_no_export(
    store: ckdiff.MaskStore, like: Path, tmp_path: Path
) -> None:
    for source in (like, Path(store.path)):
        out = tmp_path / source.name
        shutil.copytree(source, out)
        arguments = ["export", str(store.path), "--like", str(like), "-o", str(out), "--overwrite"]
        assert "which is not a file of exported masks" in error(*arguments)
    (tmp_path / "empty").mkdir()
    export(store, tmp_path / "empty", "safetensors", like=like)


# -- the name says the format ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *(("m.npz", "npz"), ("M.NPZ", "npz"), ("m.pt", "torch"), ("m.pth", "torch")),
        *(("m.bin", "torch"), ("m.ckpt", "torch"), ("m.safetensors", "safetensors")),
        *(("m", "safetensors"), ("npz", "safetensors"), ("m.npz.old", "safetensors")),
        *((".npz", "safetensors"), ("m.npy", "safetensors")),
    ],
)
def test_without_to_the_name_says_the_format(
    name: str, to: str, store: ckdiff.MaskStore, tmp_path: Path
) -> None:
    found = json.loads(ok("export", str(store.path), "-o", str(tmp_path / name), "--json").stdout)
    assert found["to"] == to
    back = ckdiff.import_masks(tmp_path / name, tmp_path / "back")
    assert back.manifest["made_by"]["format"] == to
    if to == "npz":
        np.load(tmp_path / name)
    assert ckdiff.export_masks(store, tmp_path / name, overwrite=True)["to"] == to


@pytest.mark.parametrize("name", ["m.npz", "m.pt", "m.pth", "m.safetensors", "M.NPZ"])
@pytest.mark.parametrize("to", ["safetensors", "indices", "npz", "torch"])
def test_a_name_that_would_lie_is_refused(
    name: str, to: str, store: ckdiff.MaskStore, tmp_path: Path
) -> None:
    kinds = {".npz": ["npz"], ".pt": ["torch"], ".pth": ["torch"]}
    if to in kinds.get(Path(name).suffix.lower(), ["safetensors", "indices"]):
        assert ckdiff.export_masks(store, tmp_path / name, to=to)["to"] == to
        return
    line = error("export", str(store.path), "--to", to, "-o", str(tmp_path / name))
    assert f"{name} has the ending of " in line
    assert f"leave out --to {to}" in line
    assert os.listdir(tmp_path) == []


def test_names_and_other_options(store: ckdiff.MaskStore, like: Path, tmp_path: Path) -> None:
    path = str(store.path)
    assert "packed masks go to safetensors, not to npz" in error(
        "export", path, "--packed", "-o", str(tmp_path / "m.npz")
    )
    assert "npz has none" in error(
        "export", path, "--like", str(like), "-o", str(tmp_path / "m.npz")
    )
    kinds: list[str] = ["safetensors", "npz"]
    for to in kinds:
        found = ckdiff.export_masks(store, tmp_path / f"{to}.bin", to=to)
        assert found["to"] == to


# -- percentages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "whole", "wanted"),
    [
        (25, 24, "104.17 %"),
        (3, 2, "150.00 %"),
        (10**9, 1, "100,000,000,000 %"),
        (1_000_001, 1_000_000, "100.0001 %"),
        (100_001, 100_000, "100.001 %"),
        (10**15 + 1, 10**15, "100.0000000000001 %"),
        (10**18 + 1, 10**18, "100.000000000001 %"),
        (10**18 - 1, 10**18, "99.999999999999 %"),
        (10**6 - 1, 10**6, "99.9999 %"),
        (99_994, 100_000, "99.99 %"),
        (99_996, 100_000, "99.996 %"),
        (7, 7, "100 %"),
    ],
)
def test_percentages_near_and_above_100(part: int, whole: int, wanted: str) -> None:
    found = percent(part, whole)
    if len(wanted) > len("100.000000000001 %"):
        wanted = "100.000000000001 %"  # a twelfth digit is the last
    assert found == wanted

"""``ckdiff import``: what was exported comes back, and nothing else is taken for a mask."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cli_support import error, ok
from exported_masks import ORDER, SHAPES, Flags, shards
from mask_stores import make_base, make_store, random_base
from support import write_safetensors

import ckdiff


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ckdiff.MaskStore, Flags]:
    rng = np.random.default_rng(1)
    masks = {name: rng.random(shape) < 0.2 for name, (_, shape) in SHAPES.items()}
    masks["scalar"] = np.array(True)
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder / "run.zarr", random_base(rng, SHAPES), masks), masks


def same(store: ckdiff.MaskStore, masks: Flags) -> None:
    assert sorted(t.name for t in store.tensors) == sorted(masks)
    for name, mask in masks.items():
        found = store.mask(name)
        assert found.shape == mask.shape
        assert np.array_equal(found, mask), name
    ckdiff.check_store(store)


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("to", ["safetensors", "packed", "indices", "npz", "torch"])
def test_there_and_back(
    to: str, invert: bool, made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path
) -> None:
    store, masks = made
    packed = to == "packed"
    form: Any = "safetensors" if packed else to
    ckdiff.export_masks(store, tmp_path / "file", to=form, packed=packed, invert=invert)
    back = ckdiff.import_masks(tmp_path / "file", tmp_path / "back.zarr")
    same(back, masks)
    assert [t.name for t in back.tensors] == ORDER
    assert [t.dtype for t in back.tensors] == [t.dtype for t in store.tensors]
    assert {t.base_hash for t in back.tensors} == {""}
    made_by = back.manifest["made_by"]
    assert made_by["operation"] == "import"
    assert made_by["polarity"] == ("1 = frozen" if invert else "1 = changed")
    assert [file["label"] for file in made_by["files"]] == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["back.zarr", "file"]


@pytest.mark.parametrize("to", ["safetensors", "indices"])
def test_shards_come_back(to: str, made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path) -> None:
    store, masks = made
    ckdiff.export_masks(store, tmp_path / "out", to=to, like=shards(tmp_path / "model"))
    back = ckdiff.import_masks(tmp_path / "out", tmp_path / "back.zarr")
    same(back, masks)
    assert len(back.manifest["made_by"]["files"]) == 2


def test_more_than_a_chunk(tmp_path: Path) -> None:
    import torch

    flags = np.random.default_rng(0).random((1 << 26) + 12345) < 0.01
    torch.save(
        {"a": torch.from_numpy(flags), "b": torch.ones(3, dtype=torch.uint8)}, tmp_path / "f"
    )
    for invert in (False, True):
        out = tmp_path / f"{invert}.zarr"
        same(
            ckdiff.import_masks(tmp_path / "f", out, invert=invert),
            {"a": flags ^ invert, "b": np.ones(3, bool) ^ invert},
        )


def test_the_base_gives_hashes_and_shapes(
    made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path
) -> None:
    store, masks = made
    base = make_base(tmp_path, random_base(np.random.default_rng(2), SHAPES))
    tensors = {
        f"{name}.indices": ("I64", (int(mask.sum()),), np.flatnonzero(mask)[::-1].tobytes())
        for name, mask in masks.items()
    }
    file = write_safetensors(tmp_path / "file", tensors)
    assert "with --base" in error("import", str(file), "-o", str(tmp_path / "a.zarr"))
    back = ckdiff.import_masks(file, tmp_path / "back.zarr", base=base, rule="ulp=1")
    assert back.masks == ("ulp=1",)
    for name, mask in masks.items():
        assert np.array_equal(back.mask(name), mask)
    wanted = ckdiff.diff(base, base, verify=True).table.base_hashes
    assert [t.base_hash for t in back.tensors] == wanted
    assert all(wanted)
    assert [t.dtype for t in back.tensors] == [t.dtype for t in store.tensors]
    other = make_base(tmp_path / "o", random_base(np.random.default_rng(2), {"x": ("U8", (3,))}))
    assert "lacks 6 of the masks' tensors, such as bytes" in error(
        "import", str(file), "-o", str(tmp_path / "a.zarr"), "--base", str(other)
    )


def test_masks_of_other_tools(tmp_path: Path) -> None:
    masks = {"layers.2.w": np.array([[1, 0, 1]], np.uint8), "layers.10.w": np.array([True, False])}
    np.savez_compressed(tmp_path / "f.npz", **masks)  # type: ignore[arg-type]
    wanted = {name: mask.astype(bool) for name, mask in masks.items()}
    store = ckdiff.import_masks(tmp_path / "f.npz", tmp_path / "a.zarr")
    same(store, wanted)
    assert [t.name for t in store.tensors] == ["layers.2.w", "layers.10.w"]
    assert store.tensors[0].dtype == "BOOL"
    out = str(tmp_path / "b.zarr")
    result = ok("import", str(tmp_path / "f.npz"), "-o", out, "--invert")
    assert result.stdout.splitlines() == [
        "import of f.npz: 5 elements in 2 tensors",
        "exact: 2 changed, 40.00 %",
        f"written to {out}",
    ]
    assert "import of f.npz" in ok("show", out).stdout
    found = json.loads(
        ok("import", str(tmp_path / "f.npz"), "-o", out, "--overwrite", "--json").stdout
    )
    assert found["made_by"]["format"] == "npz"
    assert "use --overwrite" in error("import", str(tmp_path / "f.npz"), "-o", out)


def metadata(**changes: str) -> dict[str, str]:
    told = {"format": "ckdiff-masks", "encoding": "bool", "polarity": "1 = changed"}
    return told | {"rule": "exact", "tensors": '{"a": ["BF16", [8]]}'} | changes


U8 = ("U8", (8,), bytes(8))
HOSTILE: dict[str, tuple[dict[str, Any], dict[str, str] | None, str]] = {
    "two": ({"a": ("U8", (2,), b"\1\2")}, None, "something else than 0 and 1"),
    "float": ({"a": ("F32", (1,), bytes(4))}, None, "is not a mask"),
    "int": ({"a": ("I32", (1,), bytes(4))}, None, "is not a mask"),
    "nothing": ({}, None, "holds no masks"),
    "no shape": ({"a.indices": ("I32", (1,), bytes(4))}, None, "what shape a has"),
    "outside": ({"a.indices": ("I32", (1,), b"\x08\0\0\0")}, metadata(), "outside its 8 elements"),
    "below": ({"a.indices": ("I32", (1,), b"\xff" * 4)}, metadata(), "outside its 8 elements"),
    "unsigned": ({"a.indices": ("U64", (1,), b"\xff" * 8)}, metadata(), "outside its 8 elements"),
    "twice": ({"a.indices": ("I32", (2,), bytes(8))}, metadata(), "names a position twice"),
    "both": ({"a": U8, "a.indices": ("I32", (0,), b"")}, metadata(), "two masks for one tensor"),
    "shape": ({"a": ("U8", (2, 4), bytes(8))}, metadata(), "has the shape [2, 4]"),
    "length": ({"a": U8}, metadata(encoding="packed"), "has the shape [8]"),
    "padding": (
        {"a": ("U8", (1,), b"\xff")},
        metadata(encoding="packed", tensors='{"a": ["U8", [7]]}'),
        "padding bits",
    ),
    "polarity": ({"a": U8}, metadata(polarity="maybe"), "polarity"),
    "rule": ({"a": U8}, metadata(rule="nonsense"), "cannot read the rule"),
    "json": ({"a": U8}, metadata(tensors="[" * 100_000), "makes no sense: tensors"),
    "list": ({"a": U8}, metadata(tensors="[1]"), "makes no sense: tensors"),
    "dtype": ({"a": U8}, metadata(tensors='{"a": ["X", [8]]}'), "makes no sense: tensors"),
    "negative": ({"a": U8}, metadata(tensors='{"a": ["U8", [-8]]}'), "makes no sense: tensors"),
    "huge": (
        {"a.indices": ("I32", (0,), b"")},
        metadata(tensors='{"a": ["U8", [1152921504606846976]]}'),
        "only a few bytes for them",
    ),
    "huger": ({"a": U8}, metadata(tensors=f'{{"a": ["U8", [{10**30}]]}}'), "no sense: tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors(case: str, tmp_path: Path) -> None:
    tensors, told, words = HOSTILE[case]
    file = write_safetensors(tmp_path / "f", tensors, told)
    assert words in error("import", str(file), "-o", str(tmp_path / "out.zarr"))
    assert os.listdir(tmp_path) == ["f"]


def array(values: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def bad_archive(path: Path, case: str) -> None:
    good = array(np.ones(100, bool))
    content: dict[str, bytes] = {
        "pickle": array(np.array([{}], dtype=object)),
        "long": good[:-1],
        "float": array(np.ones(3)),
        "fortran": array(np.asfortranarray(np.ones((2, 3), bool))),
        "magic": b"nonsense" * 20,
        "version": b"\x93NUMPY\2\0" + b"\xff" * 4 + good[10:],
        "negative": good.replace(b"(100,)", b"(-10,)"),
        "deep": good[:8] + b"\x10\x27" + b"-" * 9999 + b"1" + good[128:],
        "python2": good.replace(b"(100,)", b"(10L,)"),
        "syntax": good.replace(b"(100,)", b"(((((("),
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt" if case == "text" else "a.npy", content.get(case, good))
        if case == "metadata":
            archive.writestr("__metadata__.npy", array(np.frombuffer(b"{nonsense", np.uint8)))
    raw = path.read_bytes()
    if case == "crc":
        path.write_bytes(raw.replace(b"\1" * 100, b"\1" * 99 + b"\0"))
    elif case == "cut":
        path.write_bytes(raw[:-40])
    elif case == "encrypted":
        at = raw.index(b"PK\1\2") + 8
        path.write_bytes(raw[:6] + b"\1" + raw[7:at] + b"\1" + raw[at + 1 :])
    elif case == "method":
        at = raw.index(b"PK\1\2") + 10
        path.write_bytes(raw[:8] + b"\x63" + raw[9:at] + b"\x63" + raw[at + 1 :])


@pytest.mark.parametrize(
    "case",
    [
        *("pickle", "long", "float", "fortran", "magic", "version", "negative", "syntax", "deep"),
        *("text", "metadata", "crc", "cut", "encrypted", "method"),
        "python2",
    ],
)
def test_hostile_npz(case: str, tmp_path: Path) -> None:
    bad_archive(tmp_path / "f", case)
    assert str(tmp_path / "f") in error("import", str(tmp_path / "f"), "-o", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["f"]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("bomb",)


def test_hostile_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    cases: dict[str, Any] = {
        "bomb": {"masks": {"a": Bomb()}},
        "list": [torch.ones(3, dtype=torch.bool)],
        "text": {"a": "b"},
        "number": {1: torch.ones(3, dtype=torch.bool)},
        "float": {"a": torch.ones(3)},
        "bfloat": {"a": torch.ones(3, dtype=torch.bfloat16)},
        "expanded": {"a": torch.ones(1, dtype=torch.bool).expand(1 << 45)},
        "sparse": {"a": torch.eye(3, dtype=torch.bool).to_sparse()},
        "two": {"a": torch.full((3,), 2, dtype=torch.uint8)},
        "meta": {"a": torch.ones(3, dtype=torch.bool, device="meta")},
    }
    for case, content in cases.items():
        torch.save(content, tmp_path / "f")
        assert error("import", "f", "-o", "out.zarr"), case
        assert os.listdir(tmp_path) == ["f"], case
    raw = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(raw[:-50])
    assert error("import", "f", "-o", "out.zarr")
    (tmp_path / "f").write_bytes(pickle.dumps(Bomb()))
    assert error("import", "f", "-o", "out.zarr")
    assert os.listdir(tmp_path) == ["f"]


def test_transposed_torch_masks(tmp_path: Path) -> None:
    import torch

    mask = torch.arange(6).reshape(2, 3) % 2 == 0
    torch.save({"a": mask.T}, tmp_path / "f")
    same(ckdiff.import_masks(tmp_path / "f", tmp_path / "o"), {"a": mask.T.numpy()})


def test_wrong_arguments(made: tuple[ckdiff.MaskStore, Flags], tmp_path: Path) -> None:
    ckdiff.export_masks(made[0], tmp_path / "f")
    out = str(tmp_path / "out.zarr")
    assert "1 means changed" in error("import", str(tmp_path / "f"), "-o", out, "--invert")
    assert "does not exist" in error("import", str(tmp_path / "none"), "-o", out)
    assert "cannot read the rule" in error(
        "import", str(tmp_path / "f"), "-o", out, "--rule", "about"
    )
    assert "is not a store" in error(
        "import", str(tmp_path / "f"), "-o", str(tmp_path / "f"), "--overwrite"
    )
    os.mkfifo(tmp_path / "pipe")
    assert "named pipe" in error("import", str(tmp_path / "pipe"), "-o", out)
    with pytest.raises(ckdiff.UsageError, match="invert"):
        ckdiff.import_masks(tmp_path / "f", out, invert="no")  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == ["f", "pipe"]

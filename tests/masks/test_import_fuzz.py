"""Damaged and forged mask files: each is an error of ours, or gives the bits that are in it.

Bounded and seeded. What an archive holds has checksums, so where bytes were damaged and it is still
imported, nothing may differ. Where a forger mended the checksums, and in safetensors, which have
none, what is imported must be what numpy and the safetensors library read in the same file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mask_files import (
    Entry,
    mapping,
    notes,
    npy,
    npz_bytes,
    pickled,
    tensor,
    text,
    torch_bytes,
    zip_bytes,
)
from safetensors import numpy as safetensors_numpy
from support import safetensors_header

import ckdiff
from ckdiff.masks.importing.importing import Staged
from ckdiff.stores.building import Derived, Target

Masks = dict[str, tuple[tuple[int, ...], bytes]]  # shape and packed bits by name

_RNG = np.random.default_rng(11)
FLAGS = {
    "layers.2.w": _RNG.random((5, 7)) < 0.4,
    "layers.10.w": _RNG.random(120) < 0.2,
    "scalar": np.array(True),
    "empty": np.zeros((0, 3), bool),
}
SHAPES = {name: ["BF16", list(mask.shape)] for name, mask in FLAGS.items()}


@pytest.fixture
def bits_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Masks | None]:
    """The masks that a file's bytes become, or None where they are refused; no store is written."""

    def write(self: Target, derived: Derived, maker: Staged) -> Masks:
        layout, found = derived.layout, Masks()
        mask = np.zeros(layout.total // 8, np.uint8)
        changed = np.zeros(len(derived.names), np.int64)
        spans = layout.spans(0, layout.total)
        if layout.total:
            for _ in maker.make(0, spans, mask, changed, lambda size: None):
                pass
        for name, shape, start, elements in zip(
            derived.names, derived.shapes, layout.starts, layout.elements, strict=True
        ):
            part = mask[start // 8 : start // 8 - (-elements // 8)]
            assert not part.size or elements % 8 == 0 or part[-1] >> elements % 8 == 0
            found[name] = tuple(shape), part.tobytes()
        return found

    monkeypatch.setattr(Target, "write", write)
    path, out = tmp_path / "f", tmp_path / "out"

    def bits(content: bytes) -> Masks | None:
        path.write_bytes(content)
        try:
            found: Any = ckdiff.import_masks(path, out)
        except ckdiff.CkdiffError as error:
            line = error.one_line()
            assert line
            assert "\n" not in line
            return None
        return dict(found)

    return bits


def packed(flags: Mapping[str, Any]) -> Masks:
    return {
        name: (mask.shape, np.packbits(mask.ravel().astype(bool), bitorder="little").tobytes())
        for name, mask in flags.items()
    }


def damaged(content: bytes, rng: random.Random) -> bytes:
    """``content`` with one or two of: bits flipped, a number overwritten, cut, moved, repeated."""
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(raw))
        match rng.randrange(7):
            case 0 | 1:
                raw[at] ^= 1 << rng.randrange(8)
            case 2:
                raw[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 3:
                size = rng.choice((2, 4, 8))
                value = rng.choice((0, 1, -1, 1 << 62, rng.getrandbits(8 * size)))
                raw[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
            case 4:
                del raw[at : at + rng.choice((1, 2, 40, len(raw)))]
            case 5:
                raw[at:at] = raw[rng.randrange(len(raw)) :][: rng.choice((1, 8, 60))]
            case _:
                other = rng.randrange(len(raw))
                raw[at : at + 8], raw[other : other + 8] = (
                    raw[other : other + 8],
                    raw[at : at + 8],
                )
        if not raw:
            break
    return bytes(raw)


def variants(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(count):
        yield damaged(content, rng)


def torch_content(storages: dict[str, bytes]) -> bytes:
    tensors = {
        "layers.2.w": tensor("0", 35, [5, 7]),
        "layers.10.w": tensor("1", 120, [120]),
        "scalar": tensor("2", 1, []),
        "empty": tensor("3", 0, [0, 3]),
    }
    for key, mask in zip("0123", FLAGS.values(), strict=True):
        storages[key] = mask.tobytes()
    told = {name: text(value) for name, value in notes(SHAPES).items()}
    return pickled(mapping({"masks": mapping(tensors), "metadata": mapping(told)}))


def torch_file() -> bytes:
    storages: dict[str, bytes] = {}
    return torch_bytes(torch_content(storages), storages)


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "npz": lambda: npz_bytes(FLAGS, notes(SHAPES)),
    "packed npz": lambda: npz_bytes(FLAGS, notes(SHAPES), 8),
    "torch": torch_file,
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_damaged_archive_is_refused_or_whole(
    kind: str, bits_of: Callable[[bytes], Masks | None]
) -> None:
    content = ARCHIVES[kind]()
    wanted = packed(FLAGS)
    assert bits_of(content) == wanted
    refusals = 0
    for variant in variants(content, 1, 900):
        found = bits_of(variant)
        refusals += found is None
        assert found in (None, wanted)
    assert refusals > 500


def test_forged_array_headers(bits_of: Callable[[bytes], Masks | None], tmp_path: Path) -> None:
    good = npy(FLAGS["layers.2.w"])
    found = 0
    for variant in variants(good[:128], 2, 500):
        content = zip_bytes([Entry(b"a.npy", variant + good[128:])])
        got = bits_of(content)
        if got is None:
            continue
        found += 1
        (tmp_path / "g").write_bytes(content)
        with np.load(tmp_path / "g", allow_pickle=False) as archive:
            assert got == packed({"a": archive["a"]})
    assert found


def test_forged_metadata(bits_of: Callable[[bytes], Masks | None]) -> None:
    good = json.dumps(notes(SHAPES)).encode()
    wanted = packed(FLAGS)
    frozen = packed({name: ~mask for name, mask in FLAGS.items()})
    for variant in variants(good, 3, 500):
        got = bits_of(npz_bytes(FLAGS, variant))
        assert got in (None, wanted, frozen)


def test_forged_pickles(bits_of: Callable[[bytes], Masks | None]) -> None:
    storages: dict[str, bytes] = {}
    content = torch_content(storages)
    found = 0
    for variant in variants(content, 4, 900):
        got = bits_of(torch_bytes(variant, storages))
        for name, (shape, bits) in (got or {}).items():
            elements = int(np.prod(shape))
            assert elements <= 120, name  # no view can be larger than the largest storage
            assert len(bits) == -(-elements // 8)
        found += got is not None
    assert found


def tensors_file(encoding: str) -> bytes:
    tensors: dict[str, Any] = {}
    for name, mask in FLAGS.items():
        if encoding == "bool":
            tensors[name] = "BOOL", mask.shape, mask.tobytes()
        elif encoding == "packed":
            bits = np.packbits(mask.ravel(), bitorder="little")
            tensors[name] = "U8", bits.shape, bits.tobytes()
        else:
            places = np.flatnonzero(mask).astype("<i4")
            tensors[f"{name}.indices"] = "I32", places.shape, places.tobytes()
    header = safetensors_header(tensors, notes(SHAPES, encoding=encoding))
    data = b"".join(data for _, _, data in tensors.values())
    return bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("encoding", ["bool", "packed", "indices"])
def test_damaged_safetensors(encoding: str, bits_of: Callable[[bytes], Masks | None]) -> None:
    content = tensors_file(encoding)
    assert bits_of(content) == packed(FLAGS)
    for variant in variants(content, 5, 400):
        got = bits_of(variant)
        if got is None:
            continue
        # what cannot be told from a good file must be read as any reader would
        length = int.from_bytes(variant[:8], "little")
        told = json.loads(variant[8 : 8 + length]).get("__metadata__", {})
        told = told if told.get("format") == "ckdiff-masks" else {}
        for name, array in safetensors_numpy.load(variant).items():
            shape, bits = got[name.removesuffix(".indices") if array.itemsize > 1 else name]
            elements = int(np.prod(shape))
            flags = np.zeros(elements, bool)
            if array.itemsize > 1:
                flags[array] = True
            elif told.get("encoding") == "packed":
                flags[:] = np.unpackbits(array.view(np.uint8), count=elements, bitorder="little")
            else:
                flags[:] = array.ravel()
            if told.get("polarity") == "1 = frozen":
                flags = ~flags
            assert np.packbits(flags, bitorder="little").tobytes() == bits, name

"""What is found by name: every line leads somewhere, and a new line is all that a new thing takes.

The toys are registered here and used through the public API, as CONTRIBUTING.md says it is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mask_stores import make_store
from support import Tensor, write_safetensors

import ckdiff
from ckdiff.cli import overlap_text
from ckdiff.deltas.change import Bytes, Change, Encoding
from ckdiff.deltas.container import Delta
from ckdiff.deltas.contents import Contents, Stream
from ckdiff.deltas.frames import PackedRecorder
from ckdiff.deltas.parts import DATA
from ckdiff.deltas.registry import ENCODINGS
from ckdiff.errors import PairingError, UsageError
from ckdiff.masks.exporting.format import Format
from ckdiff.masks.exporting.masks import Masks
from ckdiff.masks.exporting.registry import FORMATS
from ckdiff.naming import Line, Registry
from ckdiff.overlaps.nulls.moments import Moments
from ckdiff.overlaps.nulls.null import Counts, Evidence, Inputs, Null
from ckdiff.overlaps.nulls.registry import NULLS

SHAPES = {"layers.0.w": (16, 16), "layers.1.w": (700,)}


@pytest.fixture
def stores(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    base: Any = {name: ("U8", shape, np.zeros(shape, np.uint8)) for name, shape in SHAPES.items()}
    made = []
    for i in range(3):
        masks = {name: rng.random(shape) < 0.5 for name, shape in SHAPES.items()}
        made.append(make_store(tmp_path / f"run{i}.zarr", base, masks).path)
    return made


@pytest.mark.parametrize(
    "registry", [NULLS, FORMATS, ENCODINGS], ids=lambda registry: registry.kind
)
def test_every_line_leads_somewhere(registry: Registry[Any]) -> None:
    for name, line in registry.lines.items():
        assert type(registry[name]).__name__.lower() == registry.kind
        assert line.help
    with pytest.raises(UsageError, match=f"there is no {registry.kind} 'nonsense'") as caught:
        registry.check("nonsense")
    assert caught.value.hint == f"one of {', '.join(registry)}"


def test_every_name_has_its_paragraph() -> None:
    pages = Path(__file__).parents[2] / "docs"
    text = (pages / "overlap.md").read_text("utf-8")
    assert [name for name in NULLS if f"\n| `{name}` |" not in text] == []
    text = (pages / "cli.md").read_text("utf-8")
    assert [name for name in FORMATS if f"\n| `--to {name}` |" not in text] == []
    text = (pages / "delta-format.md").read_text("utf-8")
    assert [name for name in ENCODINGS if f"`{name}`" not in text] == []


# -- a null ----------------------------------------------------------------------------------------


def half_of_all(counts: Counts) -> Moments:
    """Of every row, for every pair."""
    stores = len(counts.changed)
    moments = Moments.zeros(len(counts.row_elements), stores)
    moments.mean += counts.row_elements[:, None] / 2
    return moments


@dataclass
class Seen:
    """Elements that passed by."""

    elements: int
    pairs: int

    def join(self, later: Evidence) -> Seen:
        return Seen(self.elements + later.elements, self.pairs)

    def moments(self, tensor: int, base: object) -> Any:
        return np.full(self.pairs, self.elements / 4), np.ones(self.pairs)


class Watcher:
    def __init__(self, inputs: Inputs) -> None:
        self.pairs, self.seen = inputs.stores * (inputs.stores - 1) // 2, dict[int, Any]()

    def add(self, window: Any) -> None:
        spans = window.spans
        for tensor, elements in zip(spans.tensors.tolist(), spans.elements.tolist(), strict=True):
            before = self.seen.get(tensor, Seen(0, self.pairs))
            self.seen[tensor] = before.join(Seen(elements, self.pairs))

    def finish(self) -> dict[int, Evidence]:
        return self.seen

    def close(self) -> None:
        pass


HALF = Null("Given nothing.", "a lack of toys", "everything else", moments=half_of_all)
QUARTER = Null("Given little.", "toys", "the rest", collector=Watcher)


def test_a_null_is_a_line(stores: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NULLS.lines, "toy", Line(f"{__name__}:HALF", "all over the floor"))
    monkeypatch.setitem(NULLS.lines, "watched", Line(f"{__name__}:QUARTER", "under watch"))
    found = ckdiff.overlap(stores, nulls=["toy", "watched"], by="layer")
    for row in found.rows():
        for pair in row["pairs"]:
            assert pair["nulls"]["toy"]["expected"] == row["elements"] / 2
            assert pair["nulls"]["watched"]["expected"] == row["elements"] / 4
            assert pair["lift"] == pair["intersection"] / (row["elements"] / 2)
    text = " ".join(" ".join(overlap_text.lines(found, 5)).split())
    assert "times what chance would give all over the floor" in text
    assert "toy rules out a lack of toys; leaves everything else. Given nothing." in text


# -- an export format ------------------------------------------------------------------------------


class Counted:
    """How many ones each mask has, as JSON."""

    def __init__(self, masks: Masks, chosen: Any) -> None:
        self.masks, self.chosen = masks, chosen
        self.names = [masks.names[i] for i in chosen]
        self.data_size = self.size = int(masks.elements[chosen].sum())

    def write(self, path: Path, done: Callable[[int], None]) -> None:
        ones = dict.fromkeys(self.names, 0)
        for piece in self.masks.pieces(self.chosen):
            ones[self.masks.names[piece.tensor]] += int(piece.flags().sum())
            done(piece.elements)
        path.write_text(json.dumps(ones))


COUNTED = Format(Counted, suffixes=(".toy",))


def test_an_export_format_is_a_line(
    stores: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS.lines, "toy", Line(f"{__name__}:COUNTED", "for children"))
    store = ckdiff.open_store(stores[0])
    wanted = {name: int(store.mask(name).sum()) for name in SHAPES}
    for name, to in (("masks.toy", None), ("masks", "toy")):
        found = ckdiff.export_masks(store, tmp_path / name, to=to)
        assert json.loads((tmp_path / name).read_text()) == wanted
        assert (found["to"], found["ones"]) == ("toy", sum(wanted.values()))
    with pytest.raises(UsageError, match="has the ending of toy, but the format is to be npz"):
        ckdiff.export_masks(store, tmp_path / "other.toy", to="npz")
    with pytest.raises(UsageError, match="packed masks go to safetensors, not to toy"):
        ckdiff.export_masks(store, tmp_path / "other.toy", packed=True)


# -- a delta encoding ------------------------------------------------------------------------------


class PlainCoder:
    """Windows of bytes, whole where one changed."""

    def changes(self, dtype: str, base: Bytes, tuned: Bytes) -> Change:
        changed = int((base != tuned).sum())
        return Change(tuned.tobytes() if changed else b"", changed)

    def whole(self, dtype: str, tuned: Bytes) -> Change:
        return Change(tuned.tobytes(), 0)


class PlainRecorder(PackedRecorder):
    def coder(self) -> Any:
        return PlainCoder()


class PlainPatcher:
    def changes(
        self, delta: Delta, window: int, base: Bytes, out: Bytes, *, ready: Any = None
    ) -> int:
        frame = delta.frame(window)
        if frame is None:
            return 0
        out[:] = np.frombuffer(frame, np.uint8)
        return int((base != out).sum())

    def whole(self, delta: Delta, window: int, out: Bytes) -> None:
        self.changes(delta, window, out, out)


def plain_check(contents: Contents) -> int:
    if not contents.has(Stream(DATA, "U8", (int(contents.sizes.sum()),))):
        raise ValueError("the toys are not all there")
    return 1


def refuse_dolls(names: Sequence[str]) -> None:
    if "doll" in names:
        raise PairingError("a doll is no toy")


PLAIN = Encoding(PlainRecorder, PlainPatcher, plain_check, refuse_dolls)


def test_a_delta_encoding_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODINGS.lines, "toy", Line(f"{__name__}:PLAIN", "is for children"))
    tensors: dict[str, Tensor] = {"a": ("U8", (5,), b"apple"), "same": ("U8", (2,), b"me")}
    tuned = {**tensors, "a": ("U8", (5,), b"ample"), "new": ("U8", (3,), b"new")}
    sides = (
        write_safetensors(tmp_path / "base.safetensors", tensors),
        write_safetensors(tmp_path / "tuned.safetensors", tuned),
    )
    found = ckdiff.delta(*sides, tmp_path / "d.ckd", encoding="toy")
    assert (found.encoding, found.changed) == ("toy", 1)
    ckdiff.apply(sides[0], tmp_path / "d.ckd", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == sides[1].read_bytes()
    patches = ckdiff.weight_patches(tmp_path / "d.ckd", base=sides[0])
    assert {patch.name for patch in patches} == {"a", "new"}
    with pytest.raises(UsageError, match="cannot be made from the delta alone"):
        list(ckdiff.weight_patches(tmp_path / "d.ckd"))
    monkeypatch.setattr(f"{__name__}.DATA", "ckdiff.toys")
    with pytest.raises(ckdiff.DeltaError, match="the toys are not all there"):
        ckdiff.apply(sides[0], tmp_path / "d.ckd", tmp_path / "third.safetensors")
    doll = write_safetensors(tmp_path / "doll.safetensors", tensors | {"doll": ("U8", (1,), b"d")})
    with pytest.raises(PairingError, match="a doll is no toy"):
        ckdiff.delta(sides[0], doll, tmp_path / "e.ckd", encoding="toy")

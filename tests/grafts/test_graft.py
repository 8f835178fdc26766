"""``ckdiff graft``: the base where the mask is 0, tuned where it is 1, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import naive
import numpy as np
import numpy.typing as npt
import pytest
from cli_support import MOST_MEMORY, error, ok, python, stopped_at_the_end
from derived_stores import FirstBits
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Tensor, write_index, write_safetensors, write_sparse

import ckdiff
from ckdiff.kernels.blending import Blend
from ckdiff.layout import Layout
from ckdiff.outputs.rebuilt import Rebuilt
from ckdiff.stores.building import Derived, Target

MIB = 1 << 20
COPIED = ("config.json", "ckdiff-copied.json")  #: what a graft has besides weights
Bits = npt.NDArray[np.uint8]  #: 0 and 1
Model = dict[str, Tensor]

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "layers.10.w": ("BF16", (33, 100)),
    "layers.2.w": ("F32", (701,)),
    "layers.2.b": ("F4", (34, 2)),
    "layers.3.b": ("F6_E2M3", (132,)),
    "wide": ("C64", (17, 3)),
    "wider": ("I64", (90_001,)),
    "scalar": ("BF16", ()),
    "empty": ("BF16", (0, 3)),
    "bytes": ("U8", (5, 3, 1)),
    "large": ("BF16", (1 << 20, 5)),  # more than a window and several buffers
}


# the kernel against its naive twin


def of_bits(data: bytes, bits: int, elements: int) -> Bits:
    """The bits of each element in a row of its own."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return flat[: elements * bits].reshape(elements, bits)


def blended(base: bytes, tuned: bytes, mask: Bits, bits: int) -> tuple[bytes, int]:
    """What a graft makes of a tensor, and how many elements differ from the base."""
    x, y = of_bits(base, bits, len(mask)), of_bits(tuned, bits, len(mask))
    found = np.where(mask[:, None] == 1, y, x)
    differing = int((found != x).any(1).sum())
    return np.packbits(found, bitorder="little").tobytes(), differing


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from([4, 6, 8, 16, 32, 64]),
    elements=st.integers(0, 300) | st.sampled_from([512, 65_536, 65_540, 140_000]),
    shift=st.integers(0, 7),
    alike=st.booleans(),
    density=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)
def test_the_kernel(
    seed: int, bits: int, elements: int, shift: int, alike: bool, density: float
) -> None:
    rng = np.random.default_rng(seed)
    elements -= elements % 4 if bits < 8 else 0  # they fill whole bytes
    size = elements * bits // 8
    held = rng.integers(0, 256, (2, size + 8), np.uint8)
    if alike:
        held[1] = np.where(rng.random(size + 8) < 0.9, held[0], held[1])
    mask = (rng.random(elements) < density).astype(np.uint8)
    packed = np.packbits(mask, bitorder="little")
    if elements % 8:
        packed[-1] |= 256 - (1 << elements % 8)  # bits past the end mean nothing
    out = np.full(size + 8, 0xEE, np.uint8)
    base, tuned = (row[shift : shift + size] for row in held)
    counts = Blend(bits)(base, tuned, packed, out[shift : shift + size], elements)
    x, y = (row[shift : shift + size].tobytes() for row in held)
    expected, differing = blended(x, y, mask, bits)
    assert out[shift : shift + size].tobytes() == expected
    assert (out[:shift] == 0xEE).all()
    assert (out[shift + size :] == 0xEE).all()
    assert counts == (int(mask.sum()), differing)
    Blend(bits)(base, tuned, packed, base, elements)  # in its place
    assert held[0][shift : shift + size].tobytes() == expected


# checkpoints


def count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def content(seed: int, like: Model | None = None) -> Model:
    """Random bits; those of ``like`` with a third of the bytes changed."""
    rng = np.random.default_rng(seed)
    model: Model = {}
    for name, (dtype, shape) in SHAPES.items():
        raw = rng.integers(0, 256, count(shape) * naive.FORMATS[dtype].bits // 8, np.uint8)
        if like is not None:
            old = np.frombuffer(like[name][2], np.uint8)
            raw = np.where(rng.random(len(raw)) < 0.3, raw, old)
        model[name] = dtype, shape, raw.tobytes()
    return model


def sharded(folder: Path, model: Mapping[str, Tensor]) -> Path:
    """Three shards in an order of their own, unaligned, one in a directory below, and an index."""
    weight_map = {}
    names = list(model)
    for i, file in enumerate(("model-1.safetensors", "model-2.safetensors", "x/3.safetensors")):
        tensors = {name: model[name] for name in names[i::3]}
        write_safetensors(folder / file, tensors, {"format": "pt", "shard": str(i)}, pad=i)
        weight_map |= dict.fromkeys(tensors, file)
    write_index(folder, weight_map)
    return folder


def random_masks(seed: int, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Bits]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.random(count(shape)) < density).astype(np.uint8)
        for density, (name, (_, shape)) in zip(
            rng.permutation(np.linspace(0, 1, len(shapes))), shapes.items(), strict=True
        )
    }


def mask_store(path: Path, masks: Mapping[str, Bits], shapes: Any = SHAPES) -> ckdiff.MaskStore:
    """A store of these masks; its dtypes are not those of the model, as another run's may be."""
    tensors = {
        name: ("U8", shapes[name][1], mask.reshape(shapes[name][1]).tobytes())
        for name, mask in masks.items()
    }
    zeros = {name: (dtype, shape, bytes(len(raw))) for name, (dtype, shape, raw) in tensors.items()}
    files = path.with_suffix(".files")
    base = write_safetensors(files / "a.safetensors", zeros)
    ckdiff.diff(base, write_safetensors(files / "b.safetensors", tensors), path)
    return ckdiff.open_store(path)


def expected(base: Model, tuned: Model, masks: Mapping[str, Bits]) -> Model:
    result = dict(base)
    for name, mask in masks.items():
        dtype, shape, raw = base[name]
        data, _ = blended(raw, tuned[name][2], mask, naive.FORMATS[dtype].bits)
        result[name] = dtype, shape, data
    return result


def tree(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: data for name, data in files.items() if name not in COPIED}


class Pair:
    """Two checkpoints of the same tensors, in other shards each."""

    def __init__(self, folder: Path) -> None:
        self.base_model = content(1)
        self.tuned_model = content(2, self.base_model)
        self.base = sharded(folder / "base", self.base_model)
        backwards = dict(reversed(self.tuned_model.items()))
        self.tuned = write_safetensors(folder / "tuned.safetensors", backwards)
        self.masks = random_masks(3, SHAPES)
        self.mask = mask_store(folder / "mask.zarr", self.masks).path
        (self.base / "config.json").write_text("not a weight")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_bit(pair: Pair, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    made = ckdiff.graft(pair.base, pair.tuned, pair.mask, out, workers=workers)
    wanted = expected(pair.base_model, pair.tuned_model, pair.masks)
    files = tree(sharded(tmp_path / "wanted", wanted))
    assert tree(out) == files
    elements = sum(count(shape) for _, shape in SHAPES.values())
    differing = sum(
        blended(raw, pair.tuned_model[name][2], pair.masks[name], naive.FORMATS[dtype].bits)[1]
        for name, (dtype, _, raw) in pair.base_model.items()
    )
    assert made == {
        "out": str(out),
        "copied": ["config.json"],
        "files": [*sorted(set(files) - {"model.safetensors.index.json"}),
                  "model.safetensors.index.json"],
        "tensors": len(SHAPES),
        "elements": elements,
        "grafted": sum(int(mask.sum()) for mask in pair.masks.values()),
        "differing": differing,
        "rounded": 0,
        "rounded_elements": 0,
        "unmasked": [],
        "left_out": [],
        "rule": "exact",
        "store": ckdiff.open_store(pair.mask).manifest_digest(),
    }  # fmt: skip


def test_a_single_file_and_open_checkpoints(pair: Pair, tmp_path: Path) -> None:
    base = write_safetensors(tmp_path / "base.safetensors", pair.base_model, {"a": "b"}, pad=3)
    out = tmp_path / "out.safetensors"
    with ckdiff.open_checkpoint(base) as one, ckdiff.open_checkpoint(pair.tuned) as two:
        made = ckdiff.graft(one, two, ckdiff.open_store(pair.mask), out, workers=2)
        one.verify()  # still open
    wanted = expected(pair.base_model, pair.tuned_model, pair.masks)
    path = write_safetensors(tmp_path / "wanted", wanted, {"a": "b"}, pad=3)
    assert out.read_bytes() == path.read_bytes()
    assert made["files"] == ["out.safetensors"]


def test_its_own_mask_gives_tuned(pair: Pair, tmp_path: Path) -> None:
    ckdiff.diff(pair.base, pair.tuned, tmp_path / "run.zarr", rules=["exact", "ulp=1"])
    made = ckdiff.graft(pair.base, pair.tuned, tmp_path / "run.zarr", tmp_path / "out")
    assert made["grafted"] == made["differing"] > 0
    assert not ckdiff.diff(tmp_path / "out", pair.tuned).rules["exact"]["changed"]
    assert tree(tmp_path / "out") == tree(sharded(tmp_path / "wanted", pair.tuned_model))
    back = ckdiff.graft(pair.tuned, pair.base, tmp_path / "run.zarr", tmp_path / "back")
    assert back["files"] == ["back"]
    assert not ckdiff.diff(tmp_path / "back", pair.base).rules["exact"]["changed"]


@pytest.mark.parametrize("value", [0, 1])
def test_all_or_nothing(pair: Pair, tmp_path: Path, value: int) -> None:
    masks = {name: np.full(count(s), value, np.uint8) for name, (_, s) in SHAPES.items()}
    store = mask_store(tmp_path / "mask.zarr", masks)
    made = ckdiff.graft(pair.base, pair.tuned, store, tmp_path / "out")
    assert made["grafted"] == value * made["elements"]
    model = pair.tuned_model if value else pair.base_model
    assert tree(tmp_path / "out") == tree(sharded(tmp_path / "wanted", model))


def test_combined_and_random_masks(pair: Pair, tmp_path: Path) -> None:
    others = random_masks(4, SHAPES)
    mask_store(tmp_path / "other.zarr", others)
    union = ckdiff.combine("union", [pair.mask, tmp_path / "other.zarr"], tmp_path / "union.zarr")
    ckdiff.graft(pair.base, pair.tuned, union, tmp_path / "out")
    both = {name: mask | others[name] for name, mask in pair.masks.items()}
    wanted = expected(pair.base_model, pair.tuned_model, both)
    assert tree(tmp_path / "out") == tree(sharded(tmp_path / "wanted", wanted))
    control = ckdiff.random_mask(pair.mask, tmp_path / "control.zarr", seed=1)
    made = ckdiff.graft(pair.base, pair.tuned, control, tmp_path / "control")
    assert made["grafted"] == sum(int(mask.sum()) for mask in pair.masks.values())
    chosen = {name: control.mask(name).ravel().view(np.uint8) for name in SHAPES}
    wanted = expected(pair.base_model, pair.tuned_model, chosen)
    assert tree(tmp_path / "control") == tree(sharded(tmp_path / "random", wanted))


# masks of other models


SMALL: dict[str, tuple[str, tuple[int, ...]]] = {
    f"layers.{i}.w": ("BF16", (10 * i + 3,)) for i in range(4)
}


def small(names: Mapping[str, tuple[str, tuple[int, ...]]], seed: int) -> Model:
    rng = np.random.default_rng(seed)
    sizes = {name: count(s) * naive.FORMATS[d].bits // 8 for name, (d, s) in names.items()}
    return {name: (*names[name], rng.bytes(size)) for name, size in sizes.items()}


def ones(names: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Bits]:
    return {name: np.ones(count(shape), np.uint8) for name, (_, shape) in names.items()}


def test_tensors_that_not_all_have(tmp_path: Path) -> None:
    base, tuned = small(SMALL, 1), small(SMALL | {"new": ("U8", (3,))}, 2)
    del tuned["layers.0.w"]  # not in the store either
    masks = ones(SMALL) | {"gone": np.zeros(5, np.uint8), "layers.3.w": np.zeros(5, np.uint8)}
    del masks["layers.0.w"]
    shapes = SMALL | {"gone": ("U8", (5,)), "layers.3.w": ("U8", (5,))}
    mask_store(tmp_path / "mask.zarr", masks, shapes)
    arguments = [str(write_safetensors(tmp_path / "base.safetensors", base)),
                 str(write_safetensors(tmp_path / "tuned.safetensors", tuned)),
                 "--mask", str(tmp_path / "mask.zarr"), "-o", str(tmp_path / "out")]  # fmt: skip
    done = ok("graft", *arguments, "--json")
    made = json.loads(done.stdout)
    assert made["unmasked"] == ["layers.0.w", "layers.3.w"]  # one is missing, one of another shape
    assert made["left_out"] == ["new"]
    assert "that are not in the mask store stay as they are (2): " in done.stderr
    assert "tuned tensors that are not in the base are left out (1): new" in done.stderr
    wanted = base | {name: tuned[name] for name in ("layers.1.w", "layers.2.w")}
    path = write_safetensors(tmp_path / "wanted", wanted)
    assert (tmp_path / "out").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"base": {"layers.1.w": None}}, "base lacks layers.1.w"),
        ({"tuned": {"layers.1.w": None, "layers.2.w": None}}, "tuned lacks layers.1.w; and 1 more"),
        ({"base": {"layers.1.w": ("BF16", (1, 13))}}, r"layers.1.w is [1, 13] in base and [13] in"),
        ({"tuned": {"layers.1.w": ("BF16", (12,))}}, r"layers.1.w is [12] in tuned and [13] in"),
        ({"tuned": {"layers.1.w": ("I32", (13,))}}, "layers.1.w is BF16 in base and I32 in tuned"),
    ],
)
def test_a_mask_that_does_not_fit(tmp_path: Path, change: Any, problem: str) -> None:
    paths = []
    for side in ("base", "tuned"):
        names = SMALL | change.get(side, {})
        model = small({name: kind for name, kind in names.items() if kind is not None}, 1)
        paths.append(str(write_safetensors(tmp_path / f"{side}.safetensors", model)))
    mask_store(tmp_path / "mask.zarr", ones(SMALL), SMALL)
    before = sorted(os.listdir(tmp_path))
    mask, out = str(tmp_path / "mask.zarr"), str(tmp_path / "out")
    assert problem in error("graft", *paths, "--mask", mask, "-o", out)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_mask_of_another_model(pair: Pair, tmp_path: Path) -> None:
    shapes: Any = {"other": ("U8", (4,))}
    mask_store(tmp_path / "mask.zarr", {"other": np.zeros(4, np.uint8)}, shapes)
    with pytest.raises(ckdiff.PairingError, match="no tensor in common"):
        ckdiff.graft(pair.base, pair.tuned, tmp_path / "mask.zarr", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rules_and_wrong_arguments(pair: Pair, tmp_path: Path) -> None:
    arguments = [str(pair.base), str(pair.tuned), "--mask", str(pair.mask), "-o"]
    out = str(tmp_path / "out")
    assert "no mask for the rule ulp=1" in error("graft", *arguments, out, "--rule", "ulp=1")
    assert "of memory is too little" in error("graft", *arguments, out, "--memory", "64MiB")
    assert "no store" in error("graft", *arguments[:3], str(tmp_path / "none"), "-o", out)
    for inside in (pair.base, pair.base / "x", pair.tuned, pair.mask, pair.mask / "x"):
        assert "the output" in error("graft", *arguments, str(inside), "--overwrite")
    with pytest.raises(ckdiff.UsageError, match="workers"):
        ckdiff.graft(pair.base, pair.tuned, pair.mask, out, workers=0)
    assert os.listdir(tmp_path) == []
    lines = ok("graft", *arguments, out).stdout.splitlines()
    elements = sum(count(shape) for _, shape in SHAPES.values())
    assert lines[0].startswith(f"{elements:,} elements in 10 tensors: ")
    assert lines[1] == f"written to {out}, 4 files; copied config.json"
    assert "use --overwrite" in error("graft", *arguments, out)
    (tmp_path / "out" / "config.json").write_text("mine")
    assert "config.json" in error("graft", *arguments, out, "--overwrite")
    (tmp_path / "out" / "config.json").unlink()
    ok("graft", *arguments, out, "--overwrite")


# what goes wrong


def meddle(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do something when the first bytes are about to be written."""
    write, lock, did = Rebuilt.write, threading.Lock(), []

    def meddling(self: Rebuilt, *arguments: Any) -> None:
        with lock:
            if not did:
                did.append(1)
                action()
        write(self, *arguments)

    monkeypatch.setattr(Rebuilt, "write", meddling)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 1]))


@pytest.mark.parametrize("what", ["truncate", "rewrite", "replace", "unlink"])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_source_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str, what: str
) -> None:
    pair = Pair(tmp_path / "pair")
    path = pair.base / "model-1.safetensors" if side == "base" else pair.tuned

    def action() -> None:
        if what == "truncate":
            os.truncate(path, 5000)
        elif what == "rewrite":
            flip(path, path.stat().st_size - 1)
        elif what == "replace":
            (tmp_path / "other").write_bytes(path.read_bytes())
            os.replace(tmp_path / "other", path)
        else:
            path.unlink()

    meddle(monkeypatch, action)
    with pytest.raises(ckdiff.SourceChanged, match=path.name):
        ckdiff.graft(pair.base, pair.tuned, pair.mask, tmp_path / "out", workers=2)
    assert os.listdir(tmp_path) == ["pair"]


def test_a_store_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(tmp_path / "pair")

    def action() -> None:
        ckdiff.combine("union", [pair.mask, tmp_path / "pair" / "other.zarr"],
                       tmp_path / "pair" / "new.zarr")  # fmt: skip
        os.rename(pair.mask, tmp_path / "pair" / "old.zarr")
        os.rename(tmp_path / "pair" / "new.zarr", pair.mask)

    mask_store(tmp_path / "pair" / "other.zarr", random_masks(9, SHAPES))
    meddle(monkeypatch, action)
    with pytest.raises(ckdiff.StoreCorrupt):
        ckdiff.graft(pair.base, pair.tuned, pair.mask, tmp_path / "out", workers=1)
    assert os.listdir(tmp_path) == ["pair"]


def test_a_damaged_store(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "pair")
    flip(pair.mask / "masks" / "exact" / "c" / "0", 1000)
    arguments = [str(pair.base), str(pair.tuned), "--mask", str(pair.mask)]
    assert "damaged" in error("graft", *arguments, "-o", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["pair"]


def test_a_store_that_lies(tmp_path: Path) -> None:
    class Lying(FirstBits):
        def make(self, first: int, spans: Any, mask: Any, changed: Any, done: Any) -> Any:
            """See Maker."""
            yield from super().make(first, spans, mask, changed, done)
            changed += 1

    base = small(SMALL, 1)
    path = write_safetensors(tmp_path / "base.safetensors", base)
    sizes = [count(shape) for _, shape in SMALL.values()]
    derived = Derived(
        list(SMALL), ["BF16"] * 4, [(n,) for n in sizes], Layout(np.array(sizes, np.int64)),
        [""] * 4, "exact", {"operation": "test"},
    )  # fmt: skip
    target = Target(tmp_path / "mask.zarr", overwrite=False, workers=1, observer=None)
    store = target.write(derived, Lying([1, 1, 1, 1]))
    with pytest.raises(ckdiff.StoreCorrupt, match=r"layers\.0\.w .* disagrees with its count"):
        ckdiff.graft(path, path, store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (OSError(28, "No space left on device"), ckdiff.OutputError, "No space left"),
        (KeyboardInterrupt(), ckdiff.Interrupted, "interrupted"),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_what_fails_leaves_nothing(
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    kind: type[ckdiff.CkdiffError],
    words: str,
) -> None:
    put = Rebuilt._put

    def failing(self: Rebuilt, file: int, offset: int, data: Any) -> None:
        if offset > 1 << 20:
            raise failure
        put(self, file, offset, data)

    monkeypatch.setattr(Rebuilt, "_put", failing)
    with pytest.raises(kind, match=words) as caught:
        ckdiff.graft(pair.base, pair.tuned, pair.mask, tmp_path / "out")
    assert caught.value.exit_code == (130 if kind is ckdiff.Interrupted else 2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_at_the_end(pair: Pair, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    arguments = ["graft", str(pair.base), str(pair.tuned), "--mask", str(pair.mask)]
    stopped_at_the_end(number, *arguments, "-o", str(out))
    left = ["out.ckdiff-partial"] if number == signal.SIGKILL else []
    assert os.listdir(tmp_path) == left
    ok(*arguments, "-o", str(out))
    assert os.listdir(tmp_path) == ["out"]


# memory


WATCHED = """
import json, sys
import ckdiff
made = ckdiff.graft(**json.loads(sys.argv[1]))
print(json.dumps([made["grafted"], most()]))
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    used = []
    for size in (64 * MIB, 512 * MIB):
        folder = tmp_path / str(size)
        folder.mkdir()
        each = size // 4
        tensors = {f"layers.{i}.w": ("BF16", (each // 2,), each) for i in range(4)}
        edits = {name: dict.fromkeys(range(0, each, each // 100), b"\x80?") for name in tensors}
        arguments = {
            "base": str(write_sparse(folder / "base.safetensors", tensors)),
            "tuned": str(write_sparse(folder / "tuned.safetensors", tensors, edits)),
            "mask": str(folder / "run.zarr"),
            "out": str(folder / "out.safetensors"),
            "workers": 2,
            "memory": "160MiB",
        }
        ckdiff.diff(arguments["base"], arguments["tuned"], arguments["mask"])  # type: ignore[arg-type]
        done = python(MOST_MEMORY + WATCHED, json.dumps(arguments))
        assert done.returncode == 0, done.stderr
        grafted, most = json.loads(done.stdout)
        assert grafted > 0
        used.append(most)
        os.unlink(str(arguments["out"]))
    assert max(used) < 160 * MIB
    assert used[1] - used[0] < 24 * MIB

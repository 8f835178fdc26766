"""``ckdiff delta`` and ``ckdiff apply``: the same files to the last byte, or nothing at all."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_pairs import some_model, write_side
from cli_support import MOST_MEMORY, error, ok, python, stopped_at_the_end
from support import Tensor, write_index, write_safetensors, write_sparse

import ckdiff
from ckdiff.deltas import container
from ckdiff.deltas.container import Delta
from ckdiff.outputs.rebuilt import Rebuilt

MIB = 1 << 20


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a directory, or a file itself."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def weights(seed: int, elements: int) -> bytes:
    """bfloat16 bits of what weights look like."""
    values = np.random.default_rng(seed).standard_normal(elements, np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def stepped(data: bytes, density: float, seed: int) -> bytes:
    """Some 16-bit patterns one further."""
    rng = np.random.default_rng(seed)
    values = np.frombuffer(data, np.uint16)
    return (values + (rng.random(len(values)) < density).astype(np.uint16)).tobytes()


BASE: dict[str, Tensor] = {
    "layers.2.w": ("BF16", (70, 1000), weights(1, 70_000)),
    "layers.10.w": ("F32", (701,), noise(2, 2804)),
    "same": ("F16", (99,), noise(3, 198)),
    "gone": ("U8", (7,), noise(4, 7)),
    "reshaped": ("U8", (8,), noise(5, 8)),
    "retyped": ("F32", (8,), noise(6, 32)),
    "sub": ("F4", (10, 2), noise(7, 10)),
    "complex": ("C64", (50,), noise(8, 400)),
    "empty": ("BF16", (0, 3), b""),
    "scalar": ("I64", (), noise(9, 8)),
}


def tuned_of(base: Mapping[str, Tensor], density: float = 0.1) -> dict[str, Tensor]:
    tuned = dict(base)
    del tuned["gone"]
    tuned["layers.2.w"] = "BF16", (70, 1000), stepped(base["layers.2.w"][2], density, 11)
    tuned["layers.10.w"] = "F32", (701,), noise(12, 2804)
    tuned["reshaped"] = "U8", (2, 4), base["reshaped"][2]
    tuned["retyped"] = "I32", (8,), base["retyped"][2]
    tuned["added"] = "BF16", (33,), weights(13, 33)
    raw = bytearray(base["complex"][2])
    raw[0] ^= 1
    raw[4] ^= 1  # both parts of one number
    raw[16] ^= 1
    tuned["complex"] = "C64", (50,), bytes(raw)
    raw = bytearray(base["sub"][2])
    raw[0] ^= 0x11  # both elements of a byte
    tuned["sub"] = "F4", (10, 2), bytes(raw)
    return tuned


#: of TUNED's paired tensors: what a delta must count
CHANGED = {"complex": 2, "sub": 2}


def sharded(folder: Path, model: Mapping[str, Tensor]) -> Path:
    """Two unaligned shards with an index, names in an order of their own."""
    names = list(model)[::-1]
    weight_map = {}
    for i in range(2):
        name = f"model-{i}.safetensors"
        part = {n: model[n] for n in names[i::2]}
        weight_map |= dict.fromkeys(part, name)
        write_safetensors(folder / name, part, {"format": "pt", "who": "me"}, pad=3 + i)
    write_index(folder, weight_map)
    return folder


class Pair:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.base = write_safetensors(folder / "base.safetensors", BASE, pad=1)
        self.tuned = sharded(folder / "tuned", tuned_of(BASE))
        self.delta = folder / "tuned.delta"

    def make(self, **options: Any) -> ckdiff.DeltaResult:
        return ckdiff.delta(self.base, self.tuned, self.delta, overwrite=True, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    made = Pair(tmp_path_factory.mktemp("pair"))
    made.make()
    return made


# what it is for


@pytest.mark.parametrize("encoding", ["packed", "indices"])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_files_come_back_to_the_last_byte(tmp_path: Path, encoding: str, workers: int) -> None:
    pair = Pair(tmp_path / "pair")
    made = pair.make(encoding=encoding, workers=workers)
    rebuilt = ckdiff.apply(pair.base, pair.delta, tmp_path / "out", workers=workers)
    assert content(tmp_path / "out") == content(pair.tuned)
    assert rebuilt.files == ["model-0.safetensors", "model-1.safetensors"]
    assert not rebuilt.lossy
    diff = ckdiff.diff(pair.base, pair.tuned)
    assert (made.elements, made.paired) == (diff.elements, len(diff.table))
    assert made.changed == diff.rules["exact"]["changed"]
    assert made.unpaired == diff.unpaired
    with Delta(str(pair.delta)) as delta:
        changed = dict(zip(delta.blueprint.names, delta.tensors.changed.tolist(), strict=True))
    assert {name: changed[name] for name in CHANGED} == CHANGED
    assert [name for name, n in changed.items() if n and name not in dict(diff.unpaired)] != []


@pytest.mark.parametrize("seed", range(6))
def test_random_models(tmp_path: Path, seed: int) -> None:
    model = some_model(seed)
    base = write_side(tmp_path / "base", model, "base", seed)
    tuned = write_side(tmp_path / "tuned", model, "tuned", seed + 100)
    made = ckdiff.delta(base, tuned, tmp_path / "d")
    ckdiff.apply(base, tmp_path / "d", tmp_path / "out")
    assert content(tmp_path / "out") == content(tuned)
    assert made.changed == ckdiff.diff(base, tuned).rules["exact"]["changed"]


def test_a_single_file_becomes_a_single_file(tmp_path: Path, pair: Pair) -> None:
    alone = write_safetensors(tmp_path / "tuned.safetensors", tuned_of(BASE))
    ckdiff.delta(pair.base, alone, tmp_path / "d")
    ckdiff.apply(pair.base, tmp_path / "d", tmp_path / "out.safetensors")
    assert content(tmp_path / "out.safetensors") == content(alone)


def test_the_delta_does_not_depend_on_the_threads(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.w": ("BF16", (70, 1000), weights(i, 70_000)) for i in range(40)}
    tuned = {n: (d, s, stepped(raw, 0.02, i)) for i, (n, (d, s, raw)) in enumerate(tensors.items())}
    base = write_safetensors(tmp_path / "base.safetensors", tensors)
    other = write_safetensors(tmp_path / "tuned.safetensors", tuned)
    found = set()
    for workers in (1, 2, 5):
        memory = "1GiB"
        ckdiff.delta(base, other, tmp_path / f"{workers}", workers=workers, memory=memory)
        found.add((tmp_path / f"{workers}").read_bytes())
    assert len(found) == 1


def test_nothing_changed(tmp_path: Path, pair: Pair) -> None:
    made = ckdiff.delta(pair.base, pair.base, tmp_path / "d")
    assert made.changed == 0
    assert made.size < 8192
    ckdiff.apply(pair.base, tmp_path / "d", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == pair.base.read_bytes()


def test_tensors_of_several_windows(tmp_path: Path) -> None:
    raw = weights(1, 9 << 20)  # 18 MiB
    tensors: dict[str, Tensor] = {
        "w": ("BF16", (9 << 20,), raw),
        "six": ("F6_E2M3", (9 << 20,), noise(2, (9 << 20) * 6 // 8)),
    }
    base = write_safetensors(tmp_path / "base.safetensors", tensors, pad=5)
    changed = np.frombuffer(tensors["six"][2], np.uint8).copy()
    changed[[0, (3 << 20) - 1, 3 << 20, -1]] ^= 1
    tuned = write_safetensors(
        tmp_path / "tuned.safetensors",
        {
            "w": ("BF16", (9 << 20,), stepped(raw, 0.001, 1)),
            "six": ("F6_E2M3", (9 << 20,), changed.tobytes()),
            "new": ("BF16", (9 << 20,), raw),
        },
    )
    made = ckdiff.delta(base, tuned, tmp_path / "d")
    ckdiff.apply(base, tmp_path / "d", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == tuned.read_bytes()
    assert made.changed == ckdiff.diff(base, tuned).rules["exact"]["changed"]


# chains


def test_a_chain(tmp_path: Path) -> None:
    models = [BASE, tuned_of(BASE)]
    third = dict(models[1])
    third["layers.2.w"] = "BF16", (70, 1000), stepped(models[1]["layers.2.w"][2], 0.01, 5)
    third["added"] = "BF16", (33,), stepped(models[1]["added"][2], 0.5, 6)
    third["gone"] = "U8", (7,), noise(44, 7)  # back again, with other bytes
    models.append(third)
    last = dict(third)
    last["reshaped"] = "U8", (2, 4), noise(45, 8)
    models.append(last)
    folders = [sharded(tmp_path / str(i), model) for i, model in enumerate(models)]
    deltas = []
    for i, encoding in enumerate(["packed", "indices", "packed"]):
        deltas.append(tmp_path / f"{i}.delta")
        ckdiff.delta(folders[i], folders[i + 1], deltas[-1], encoding=encoding)  # type: ignore[arg-type]
    for stop in (1, 2, 3):
        out = tmp_path / f"out{stop}"
        made = ckdiff.apply(folders[0], deltas[:stop], out)
        assert content(out) == content(folders[stop])
        assert made.deltas == stop
    for wrong, words in [
        ([deltas[1], deltas[0]], "does not follow"),
        ([deltas[0], deltas[2]], "does not follow"),
        ([deltas[0], deltas[0]], "does not follow"),
        (deltas[1:], "was not made for 0"),
    ]:
        with pytest.raises(ckdiff.DeltaError, match=words):
            ckdiff.apply(folders[0], wrong, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


# masks


def test_a_mask_chooses(tmp_path: Path, pair: Pair) -> None:
    store = ckdiff.diff(pair.base, pair.tuned, tmp_path / "m.zarr").store
    assert store is not None
    half = ckdiff.random_mask(store, tmp_path / "r.zarr", seed=1)
    both = ckdiff.combine("intersection", [store, half], tmp_path / "both.zarr")
    full = ckdiff.delta(pair.base, pair.tuned, tmp_path / "full", mask=store)
    assert full.lossy is not None
    assert full.lossy["left_out"] == 0
    ckdiff.apply(pair.base, tmp_path / "full", tmp_path / "same")
    assert content(tmp_path / "same") == content(pair.tuned)
    part = ckdiff.delta(pair.base, pair.tuned, tmp_path / "part", mask=half)
    assert part.lossy is not None
    kept = sum(row.changed["exact"] for row in both.tensors)
    assert part.changed == kept
    assert part.lossy["left_out"] == full.changed - kept > 0
    made = ckdiff.apply(pair.base, tmp_path / "part", tmp_path / "partly")
    assert made.lossy
    assert ckdiff.info(tmp_path / "part")["lossy"] == part.lossy
    ckdiff.graft(pair.base, pair.tuned, half, tmp_path / "graft.safetensors")
    diff = ckdiff.diff(tmp_path / "graft.safetensors", tmp_path / "partly")
    assert diff.rules["exact"]["changed"] == 0
    assert diff.unpaired == ckdiff.diff(pair.base, pair.tuned).unpaired


def test_a_mask_that_does_not_fit(tmp_path: Path, pair: Pair) -> None:
    other = {"layers.2.w": ("BF16", (1000, 70), weights(1, 70_000))}
    base = write_safetensors(tmp_path / "a.safetensors", other)
    raw = stepped(other["layers.2.w"][2], 0.1, 1)
    tuned = write_safetensors(tmp_path / "b.safetensors", {"layers.2.w": ("BF16", (1000, 70), raw)})
    ckdiff.diff(base, tuned, tmp_path / "m.zarr")
    with pytest.raises(ckdiff.PairingError, match=r"\[70, 1000\] in base and \[1000, 70\]"):
        ckdiff.delta(pair.base, pair.tuned, tmp_path / "d", mask=tmp_path / "m.zarr")
    with pytest.raises(ckdiff.UsageError, match="a rule chooses"):
        ckdiff.delta(pair.base, pair.tuned, tmp_path / "d", rule="exact")
    assert not (tmp_path / "d").exists()


# what goes wrong


def test_another_base(tmp_path: Path, pair: Pair) -> None:
    other = dict(BASE)
    raw = bytearray(BASE["same"][2])
    raw[-1] ^= 1  # in a tensor that the delta does not touch
    other["same"] = "F16", (99,), bytes(raw)
    bases = {"same": write_safetensors(tmp_path / "1.safetensors", other)}
    other = dict(BASE)
    other["layers.2.w"] = "BF16", (70, 1000), weights(77, 70_000)
    bases["layers.2.w"] = write_safetensors(tmp_path / "2.safetensors", other)
    other = dict(BASE)
    del other["scalar"]
    bases["scalar"] = write_safetensors(tmp_path / "3.safetensors", other)
    for name, base in bases.items():
        with pytest.raises(ckdiff.DeltaError, match=f"was not made for .*: {name} differs"):
            ckdiff.apply(base, pair.delta, tmp_path / "out")
    line = error("apply", str(bases["same"]), str(pair.delta), "-o", str(tmp_path / "out"))
    assert "give the checkpoint that the delta was made from" in line
    assert sorted(os.listdir(tmp_path)) == ["1.safetensors", "2.safetensors", "3.safetensors"]


def test_any_flipped_byte_is_noticed(tmp_path: Path, pair: Pair) -> None:
    raw = pair.delta.read_bytes()
    rng = np.random.default_rng(0)
    places = {*range(8), *rng.integers(8, len(raw), 150).tolist(), len(raw) - 1}
    head = int.from_bytes(raw[:8], "little")
    noticed = 0
    for place in sorted(places):
        data = bytearray(raw)
        data[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "d").write_bytes(data)
        found = None
        try:
            ckdiff.apply(pair.base, tmp_path / "d", tmp_path / "out")
        except ckdiff.CkdiffError as error:
            found = error
        if found is not None:
            assert found.exit_code == 2
            assert "\n" not in found.one_line()
            noticed += 1
        else:  # a key of the metadata that nothing reads
            assert 8 <= place < 8 + head
            assert content(tmp_path / "out") == content(pair.tuned)
            ckdiff.apply(pair.base, tmp_path / "d", tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out.ckdiff-partial").exists()
    assert noticed > 100


def test_any_cut_is_noticed(tmp_path: Path, pair: Pair) -> None:
    raw = pair.delta.read_bytes()
    for size in [0, 1, 7, 8, 100, 2000, 2056, 2057, *range(3000, len(raw), 997), len(raw) - 1]:
        (tmp_path / "d").write_bytes(raw[:size])
        with pytest.raises(ckdiff.CkdiffError):
            ckdiff.apply(pair.base, tmp_path / "d", tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["d"]


def test_what_is_no_delta(tmp_path: Path, pair: Pair) -> None:
    for path in (pair.base, pair.tuned, tmp_path / "none"):
        assert error("apply", str(pair.base), str(path), "-o", str(tmp_path / "out"))
    with pytest.raises(ckdiff.DeltaError, match="is a checkpoint, not a delta"):
        ckdiff.apply(pair.base, pair.base, tmp_path / "out")
    with pytest.raises(ckdiff.UsageError, match="no delta"):
        ckdiff.apply(pair.base, [], tmp_path / "out")
    with pytest.raises(ckdiff.UsageError, match="no encoding"):
        ckdiff.delta(pair.base, pair.tuned, tmp_path / "d", encoding="zip")  # type: ignore[arg-type]


def rewrite(path: Path, out: Path, change: Any) -> None:
    """Write a delta whose manifest was changed, with right digests."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    first, last = header[container.MANIFEST]["data_offsets"]
    manifest = json.loads(raw[8 + size + first : 8 + size + last])
    change(manifest)
    text = json.dumps(manifest).encode()
    header[container.MANIFEST] = {
        "dtype": "U8", "shape": [len(text)], "data_offsets": [first, first + len(text)],
    }  # fmt: skip
    header["__metadata__"]["manifest"] = container.digest(text)
    new = json.dumps(header).encode()
    out.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size : 8 + size + first] + text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", None),
        ("files", [["../evil.safetensors", 100, 50]]),
        ("files", [["a.safetensors", 1 << 62, 8]]),
        ("files", []),
        ("files", [[1, 2, 3]]),
        ("index", "../../evil.json"),
        ("directory", False),
        ("parts", {}),
        ("parts", {"ckdiff.heads": [1 << 60, ""]}),
        ("encoding", "other"),
        ("encoding", None),
        ("elements", "many"),
    ],
)
def test_manifests_that_make_no_sense(tmp_path: Path, pair: Pair, key: str, value: Any) -> None:
    rewrite(pair.delta, tmp_path / "d", lambda manifest: manifest.update({key: value}))
    if key == "elements":
        with pytest.raises(ckdiff.CkdiffError):
            ckdiff.info(tmp_path / "d")
        return
    with pytest.raises(ckdiff.CkdiffError):
        ckdiff.apply(pair.base, tmp_path / "d", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["d"]


def test_outputs_in_the_way(tmp_path: Path, pair: Pair) -> None:
    out = tmp_path / "d"
    out.write_text("mine")
    with pytest.raises(ckdiff.OutputError, match="is not a delta"):
        ckdiff.delta(pair.base, pair.tuned, out, overwrite=True)
    out.unlink()
    ckdiff.delta(pair.base, pair.tuned, out)
    assert "use --overwrite" in error("delta", str(pair.base), str(pair.tuned), "-o", str(out))
    ok("delta", str(pair.base), str(pair.tuned), "-o", str(out), "--overwrite")
    with pytest.raises(ckdiff.CkdiffError, match="the output"):
        ckdiff.delta(pair.base, pair.tuned, pair.tuned / "model-0.safetensors", overwrite=True)
    with pytest.raises(ckdiff.CkdiffError, match="the output"):
        ckdiff.apply(pair.base, out, pair.base, overwrite=True)
    assert content(pair.tuned) == content(sharded(tmp_path / "again", tuned_of(BASE)))


def test_a_full_disk_and_ctrl_c(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for failure, kind in [
        (OSError(28, "No space left on device"), ckdiff.OutputError),
        (KeyboardInterrupt(), ckdiff.Interrupted),
    ]:

        def failing(self: Any, *arguments: Any, failure: BaseException = failure) -> None:
            raise failure

        with monkeypatch.context() as patched:
            patched.setattr(container.DeltaWriter, "append", failing)
            with pytest.raises(kind):
                ckdiff.delta(pair.base, pair.tuned, tmp_path / "d")
        with monkeypatch.context() as patched:
            patched.setattr(Rebuilt, "_put", failing)
            with pytest.raises(kind):
                ckdiff.apply(pair.base, pair.delta, tmp_path / "out")
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_at_the_end(tmp_path: Path, pair: Pair, number: signal.Signals) -> None:
    runs = [
        (["delta", str(pair.base), str(pair.tuned)], tmp_path / "d"),
        (["apply", str(pair.base), str(pair.delta)], tmp_path / "out"),
    ]
    for arguments, out in runs:
        stopped_at_the_end(number, *arguments, "-o", str(out))
        assert not out.exists()
        ok(*arguments, "-o", str(out))
        assert out.exists()
    assert sorted(os.listdir(tmp_path)) == ["d", "out"]


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_source_that_is_cut(tmp_path: Path, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(tmp_path / "pair")
    path = pair.base if side == "base" else pair.tuned / "model-0.safetensors"
    lock, did = threading.Lock(), list[int]()
    from ckdiff.deltas.frames import PackedCoder

    changes = PackedCoder.changes

    def meddling(self: PackedCoder, *arguments: Any) -> Any:
        with lock:
            if not did:
                did.append(1)
                os.truncate(path, 4000)
        return changes(self, *arguments)

    monkeypatch.setattr(PackedCoder, "changes", meddling)
    with pytest.raises(ckdiff.SourceChanged, match=path.name):
        pair.make()
    assert not pair.delta.exists()


# info


def test_info(tmp_path: Path, pair: Pair) -> None:
    found = json.loads(ok("info", str(pair.delta), "--json").stdout)
    assert found["kind"] == "delta"
    assert found["files"] == ["model-0.safetensors", "model-1.safetensors"]
    assert found["index"] == "model.safetensors.index.json"
    assert found["unpaired"]["added"] == ["added"]
    lines = ok("info", str(pair.delta)).stdout
    assert "a delta, packed" in lines
    assert "configs, tokenizers and other files are not part of it" in lines
    ckdiff.diff(pair.base, pair.tuned, tmp_path / "m.zarr")
    assert ckdiff.info(tmp_path / "m.zarr")["kind"] == "store"
    assert "a mask store" in ok("info", str(tmp_path / "m.zarr")).stdout
    assert ckdiff.info(pair.tuned)["dtypes"]["BF16"] == 70_033
    assert "a checkpoint, 2 files" in ok("info", str(pair.tuned)).stdout
    error("info", str(tmp_path / "nothing"))


# memory


WATCHED = """
import json, sys
import ckdiff
base, tuned, folder = sys.argv[1:]
found = []
ckdiff.delta(base, tuned, folder + "/d", workers=2, memory="256MiB")
found.append(most())
ckdiff.apply(base, folder + "/d", folder + "/out.safetensors", workers=2, memory="256MiB")
found.append(most())
print(json.dumps(found))
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    used = []
    for size in (64 * MIB, 512 * MIB):
        folder = tmp_path / str(size)
        folder.mkdir()
        each = size // 4
        tensors = {f"layers.{i}.w": ("BF16", (each // 2,), each) for i in range(4)}
        edits = {name: dict.fromkeys(range(0, each, each // 5000), b"\x80?") for name in tensors}
        base = write_sparse(folder / "base.safetensors", tensors)
        tuned = write_sparse(folder / "tuned.safetensors", tensors, edits)
        done = python(MOST_MEMORY + WATCHED, str(base), str(tuned), str(folder))
        assert done.returncode == 0, done.stderr
        used.append(json.loads(done.stdout))
        for path in folder.iterdir():
            path.unlink()
    assert max(map(max, used)) < 256 * MIB
    assert used[1][1] - used[0][1] < 32 * MIB

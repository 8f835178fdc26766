"""Weight versions: writing one, applying it anew and in place, against the format's reference way.

    python bench/sync.py [--gib 0.25] [--changed 1,2,3,5,10] [--rounds 3] [--workers N] [--dir DIR]
                         [--encoding xor] [--kind steps|any] [--json] [--quick]

The reference is what the format's description says, written here with numpy, zstandard at level 1,
xxhash and a pool of threads over tensors: whole tensors in memory, a safetensors file at the end.
Both read the same two bf16 checkpoints of --gib GiB a side from the page cache, and both bring what
they write to the disk; in place is measured without that too. ``steps`` changes elements by one
unit in the last place, as a small step of an optimizer does; ``any`` puts random bits there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard
from common import Tensor, bf16_noise, header, median, table, take_turns, timed, write_index

from ckdiff import apply_in_place, delta
from ckdiff.deltas.versions import journal, patching
from ckdiff.deltas.versions.applying import apply_anew
from ckdiff.deltas.versions.writing import write_version

COLUMNS = 4096
PER_TENSOR = 1 << 25  # elements: 64 MiB
Bits = npt.NDArray[np.uint16]


def make(folder: Path, data: list[Bits], shards: int = 2) -> None:
    """A bf16 checkpoint of matrices."""
    folder.mkdir(parents=True)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(len(data))]
    files: dict[str, Sequence[Tensor]] = {}
    for s in range(shards):
        mine = list(range(s, len(data), shards))
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        files[file] = [(names[i], "BF16", (len(data[i]) // COLUMNS, COLUMNS)) for i in mine]
        with open(folder / file, "wb") as f:
            f.write(header(files[file])[0])
            for i in mine:
                f.write(data[i].data)
    write_index(folder, files)


def changed(base: Bits, share: float, kind: str, seed: int) -> Bits:
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(rng.random(len(base), dtype=np.float32) < np.float32(share))
    tuned = base.copy()
    if kind == "any":
        tuned[places] ^= rng.integers(1, 1 << 16, len(places), dtype=np.uint16)
    else:
        tuned[places] += rng.choice(np.array([1, 0xFFFF], np.uint16), len(places))
    return tuned


class Mapped:
    """A checkpoint's tensors as bytes, mapped."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, npt.NDArray[np.uint8]] = {}
        self.heads: dict[Path, bytes] = {}
        self.order: list[tuple[Path, str]] = []
        for path in sorted(folder.glob("*.safetensors")):
            raw = np.memmap(path, np.uint8, "r")
            start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
            self.heads[path] = raw[:start].tobytes()
            entries = json.loads(self.heads[path][8:])
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                self.tensors[name] = raw[start + begin : start + end]
                self.order.append((path, name))


def reference_write(base: Path, tuned: Path, out: Path, workers: int) -> None:
    """One version as the description has it."""
    one, other = Mapped(base), Mapped(tuned)

    def encode(name: str) -> tuple[str, bytes, str] | None:
        new = other.tensors[name]
        exclusive = np.bitwise_xor(one.tensors[name], new)
        if not exclusive.any():
            return None
        frame = zstandard.ZstdCompressor(level=1).compress(exclusive.data)
        return name, frame, xxhash.xxh3_128_hexdigest(new.data)

    with ThreadPoolExecutor(workers) as pool:
        frames = [found for found in pool.map(encode, other.tensors) if found is not None]
    out.mkdir(parents=True)
    entries: dict[str, Any] = {"__metadata__": {name: digest for name, _, digest in frames}}
    at = 0
    for name, frame, _ in frames:
        entries[name] = {"dtype": "U8", "shape": [len(frame)],
                         "data_offsets": [at, at + len(frame)]}  # fmt: skip
        at += len(frame)
    text = json.dumps(entries).encode()
    file = "model-00000-of-00001.safetensors"
    with open(out / file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, frame, _ in frames:
            f.write(frame)
        f.flush()
        os.fsync(f.fileno())
    metadata = {"version": "000001", "base_version": "000000", "delta_encoding": "xor",
                "compression_format": "zstd", "checksum_format": "xxh3-128"}  # fmt: skip
    index = {"metadata": metadata, "weight_map": {name: file for name, _, _ in frames}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def reference_apply(base: Path, version: Path, out: Path, workers: int) -> None:
    """Copy the base, then change it in place through a mapping, tensors in parallel."""
    shutil.copytree(base, out)
    reference_in_place(out, version, workers)


def reference_in_place(local_folder: Path, version: Path, workers: int) -> None:
    """Change a copy of the base through a mapping: killed on the way, it is lost."""
    local = {}
    for path in sorted(local_folder.glob("*.safetensors")):
        raw = np.memmap(path, np.uint8, "r+")
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        for name, entry in json.loads(raw[8:start].tobytes()).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                local[name] = raw[start + begin : start + end]
    held = Mapped(version)
    digests: dict[str, str] = {}
    for head in held.heads.values():
        digests |= json.loads(head[8:])["__metadata__"]

    def change(name: str) -> None:
        payload = zstandard.ZstdDecompressor().decompress(held.tensors[name].data)
        target = local[name]
        np.bitwise_xor(target, np.frombuffer(payload, np.uint8), out=target)
        assert xxhash.xxh3_128_hexdigest(target.data) == digests[name]

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(change, held.tensors))
    for path in sorted(local_folder.glob("*.safetensors")):
        with open(path, "rb") as f:
            os.fsync(f.fileno())


@contextmanager
def unsynced() -> Iterator[None]:
    """Nobody waits for the disk, nor tells it to begin: what is left is the work itself."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(os, "fsync", lambda fd: None))
        for module in (journal, patching):
            stack.enter_context(patch.object(module, "start_writeback", lambda *_: None))
        yield


def in_place(
    root: Path, works: dict[str, Callable[[Path], object]], rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds of each for a local copy, which is warm and not part of what is timed: brought to the
    disk as all of them do, and without.
    """
    found: dict[str, dict[str, list[float]]] = {
        how: {name: [] for name in works} for how in ("synced", "unsynced")
    }
    local = root / "local"
    for _ in range(rounds):
        for how, name in product(found, works):
            shutil.rmtree(local, ignore_errors=True)
            shutil.copytree(root / "base", local)
            os.sync()
            with unsynced() if how == "unsynced" else nullcontext():
                found[how][name].append(timed(partial(works[name], local))())
            for path in sorted((root / "tuned").glob("*.safetensors")):
                if path.read_bytes() != (local / path.name).read_bytes():
                    raise SystemExit(f"{path.name} was not changed as it should be")
    return {how: {name: median(values) for name, values in of.items()} for how, of in found.items()}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def run(root: Path, base: list[Bits], share: float, options: argparse.Namespace) -> dict[str, Any]:
    """Both at one density."""
    shutil.rmtree(root / "tuned", ignore_errors=True)
    tuned = [changed(bits, share, options.kind, i) for i, bits in enumerate(base)]
    make(root / "tuned", tuned)
    workers = options.workers
    places = {name: root / name for name in ("reference", "ours", "applied", "patched")}

    def fresh(name: str) -> Path:
        shutil.rmtree(places[name], ignore_errors=True)
        return places[name]

    def ours() -> None:
        write_version(root / "base", root / "tuned", fresh("ours"), encoding=options.encoding,
                      workers=workers)  # fmt: skip

    def reference() -> None:
        reference_write(root / "base", root / "tuned", fresh("reference"), workers)

    version = places["ours"] / "weight_v000001"
    seconds = take_turns({"reference": timed(reference), "ours": timed(ours)}, options.rounds)

    def apply_ours() -> None:
        apply_anew(root / "base", places["ours"], fresh("applied"), workers=workers)

    def apply_reference() -> None:
        reference_apply(root / "base", places["reference"], fresh("patched"), workers)

    applied = take_turns(
        {"reference": timed(apply_reference), "ours": timed(apply_ours)}, options.rounds
    )
    for path in sorted((root / "tuned").glob("*.safetensors")):
        if path.read_bytes() != (places["applied"] / path.name).read_bytes():
            raise SystemExit(f"{path.name} was not rebuilt")
    delta(root / "base", root / "tuned", root / "packed", overwrite=True, workers=workers)
    in_place_of: dict[str, Callable[[Path], object]] = {
        "reference": lambda local: reference_in_place(local, places["reference"], workers),
        "ours": lambda local: apply_in_place(local, places["ours"], workers=workers),
        "packed": lambda local: apply_in_place(local, root / "packed", workers=workers),
    }
    nbytes = sum(bits.nbytes for bits in base)
    sizes = {"reference": size_of(places["reference"]), "ours": size_of(version)}
    return {
        "changed": share,
        "bytes": nbytes,
        "sizes": sizes,
        "create": {name: median(values) for name, values in seconds.items()},
        "apply": {name: median(values) for name, values in applied.items()},
        "in_place": in_place(root, in_place_of, options.rounds),
    }


def in_place_cells(nbytes: int, seconds: dict[str, float]) -> list[float]:
    """GB/s of the reference and ours, how many times as fast, and GB/s of a packed delta."""
    rates = {name: nbytes / value / 1e9 for name, value in seconds.items()}
    return [rates["reference"], rates["ours"], rates["ours"] / rates["reference"], rates["packed"]]


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The table."""
    cells = []
    for row in rows:
        create, apply, sizes = row["create"], row["apply"], row["sizes"]
        placed, unsynced = row["in_place"]["synced"], row["in_place"]["unsynced"]
        cells.append([
            f"{100 * row['changed']:g} %",
            row["bytes"] / create["reference"] / 1e9, row["bytes"] / create["ours"] / 1e9,
            create["reference"] / create["ours"],
            f"{100 * sizes['reference'] / row['bytes']:.2f} %",
            f"{100 * sizes['ours'] / row['bytes']:.2f} %",
            row["bytes"] / apply["reference"] / 1e9, row["bytes"] / apply["ours"] / 1e9,
            apply["reference"] / apply["ours"],
            *in_place_cells(row["bytes"], placed), *in_place_cells(row["bytes"], unsynced),
        ])  # fmt: skip
    title = (
        f"Weight versions, {options.encoding}, 2 x {options.gib:g} GiB of bf16, changes: "
        f"{options.kind}, {options.workers} threads; GB/s of model, medians of {options.rounds}"
    )
    columns = ["changed", "create: reference", "ours", "times", "size: reference", "ours",
               "apply anew: reference", "ours", "times",
               "in place: reference", "ours", "times", "packed",
               "in place, not synced: reference", "ours", "times", "packed"]  # fmt: skip
    table(title, columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=0.25)
    parser.add_argument("--changed", default="1,2,3,5,10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--encoding", choices=["xor", "overwrite"], default="xor")
    parser.add_argument("--kind", choices=["steps", "any"], default="steps")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.gib, options.changed, options.rounds = 1 / 64, "1", 1
    count = max(2, round(options.gib * 2**30 / (2 * PER_TENSOR)))
    each = int(options.gib * 2**29 / count) // COLUMNS * COLUMNS
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        root = Path(folder)
        base = [bf16_noise(each, seed) for seed in range(count)]
        make(root / "base", base)
        shares = [float(text) / 100 for text in options.changed.split(",")]
        rows = [run(root, base, share, options) for share in shares]
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        show(rows, options)


if __name__ == "__main__":
    main()

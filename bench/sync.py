"""Weight versions: writing one, applying it anew and in place, against the format's reference way.

    python bench/sync.py [--gib 0.25] [--changed 1,2,3,5,10] [--rounds 3] [--workers N] [--dir DIR]
                         [--encoding xor] [--kind steps|any] [--only STAGE ...] [--json] [--quick]

The reference is what the format's description says, written here with numpy, zstandard at level 1,
xxhash and a pool of threads over tensors: whole tensors in memory, a safetensors file at the end.
Both read the same two bf16 checkpoints of --gib GiB a side from the page cache, and both bring what
they write to the disk; in place is measured without that too. Applying to a new place stands
beside ``cp`` and ``sync`` of the same files. ``steps`` changes elements by one unit in the last
place, as a small step of an optimizer does; ``any`` puts random bits there. ``packed`` is a delta
that only ckdiff reads. The stages are ``create``, which is always done, ``anew`` and ``in_place``.
On the disk there are three models at a time, and the deltas.
"""

from __future__ import annotations

import argparse
import filecmp
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
from common import (
    COLUMNS,
    Tensor,
    bf16_noise,
    changed,
    header,
    median,
    percent,
    shell,
    table,
    take_turns,
    tensors_of,
    timed,
    version_options,
    write_index,
)

from ckdiff import apply, apply_in_place, delta
from ckdiff.deltas.versions import journal, patching
from ckdiff.deltas.versions.applying import apply_anew
from ckdiff.deltas.versions.writing import write_version

Bits = npt.NDArray[np.uint16]


STAGES = ("create", "anew", "in_place")


def names_of(count: int) -> list[str]:
    return [f"model.layers.{i}.mlp.up_proj.weight" for i in range(count)]


def make(folder: Path, count: int, each: int, data: Callable[[int], Bits]) -> None:
    """A bf16 checkpoint of ``count`` matrices of ``each`` elements, made one at a time."""
    folder.mkdir(parents=True)
    names, shards = names_of(count), 2
    files: dict[str, Sequence[Tensor]] = {}
    for s in range(shards):
        mine = list(range(s, count, shards))
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        files[file] = [(names[i], "BF16", (each // COLUMNS, COLUMNS)) for i in mine]
        with open(folder / file, "wb") as f:
            f.write(header(files[file])[0])
            for i in mine:
                f.write(data(i).data)
    write_index(folder, files)


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
        for name in ("fsync", "fdatasync"):
            stack.enter_context(patch.object(os, name, lambda fd: None))
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
            held_against(root / "tuned", local)
    shutil.rmtree(local)
    return {how: {name: median(values) for name, values in of.items()} for how, of in found.items()}


def held_against(tuned: Path, made: Path) -> None:
    """Every byte of every shard."""
    for path in sorted(tuned.glob("*.safetensors")):
        if not filecmp.cmp(path, made / path.name, shallow=False):
            raise SystemExit(f"{path.name} was not made as it should be")


def anew(root: Path, works: dict[str, Callable[[Path], object]], rounds: int) -> dict[str, float]:
    """Seconds of each for a new checkpoint on the disk, which is removed again."""
    found: dict[str, list[float]] = {name: [] for name in works}
    out = root / "new"
    for _, (name, work) in product(range(rounds), works.items()):
        os.sync()  # nobody pays for what others have written
        found[name].append(timed(partial(work, out))())
        held_against(root / "tuned", out)
        shutil.rmtree(out)
    return {name: median(values) for name, values in found.items()}


def copied(tuned: Path, out: Path) -> None:
    """No delta at all."""
    shell(f"cp -r '{tuned}' '{out}' && sync '{out}'/*")()


def size_of(path: Path) -> int:
    return sum(one.stat().st_size for one in ([path] if path.is_file() else path.iterdir()))


def run(root: Path, count: int, share: float, options: argparse.Namespace) -> dict[str, Any]:
    """All at one density."""
    base, tuned, workers = root / "base", root / "tuned", options.workers
    shutil.rmtree(tuned, ignore_errors=True)
    known = Mapped(base).tensors
    held = [known[name] for name in names_of(count)]
    make(tuned, count, held[0].size // 2,
         lambda i: changed(held[i].view(np.uint16), share, options.kind, i))  # fmt: skip
    places = {name: root / name for name in ("reference", "ours", "packed")}

    def fresh(name: str) -> Path:
        shutil.rmtree(places[name], ignore_errors=True)
        return places[name]

    def ours() -> None:
        write_version(base, tuned, fresh("ours"), encoding=options.encoding, workers=workers)

    create: dict[str, Callable[[], object]] = {
        "reference": lambda: reference_write(base, tuned, fresh("reference"), workers),
        "ours": ours,
        "packed": lambda: delta(base, tuned, places["packed"], overwrite=True, workers=workers),
    }
    seconds = take_turns({name: timed(work) for name, work in create.items()}, options.rounds)
    found = {
        "changed": share,
        "bytes": sum(one.nbytes for one in held),
        "sizes": {
            "reference": size_of(places["reference"]),
            "ours": size_of(places["ours"] / "weight_v000001"),
            "packed": size_of(places["packed"]),
        },
        "create": {name: median(values) for name, values in seconds.items()},
    }
    if "anew" in options.only:
        works: dict[str, Callable[[Path], object]] = {
            "copy": lambda out: copied(tuned, out),
            "reference": lambda out: reference_apply(base, places["reference"], out, workers),
            "ours": lambda out: apply_anew(base, places["ours"], out, workers=workers),
            "packed": lambda out: apply(base, places["packed"], out, workers=workers),
        }
        found["anew"] = anew(root, works, options.rounds)
    if "in_place" in options.only:
        works = {
            "reference": lambda local: reference_in_place(local, places["reference"], workers),
            "ours": lambda local: apply_in_place(local, places["ours"], workers=workers),
            "packed": lambda local: apply_in_place(local, places["packed"], workers=workers),
        }
        found["in_place"] = in_place(root, works, options.rounds)
    return found


def in_place_cells(nbytes: int, seconds: dict[str, float]) -> list[float]:
    """GB/s of the reference and ours, how many times as fast, and GB/s of a packed delta."""
    rates = {name: nbytes / value / 1e9 for name, value in seconds.items()}
    return [rates["reference"], rates["ours"], rates["ours"] / rates["reference"], rates["packed"]]


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The tables."""
    what = (
        f"{options.encoding}, 2 x {options.gib:g} GiB of bf16, changes: {options.kind}, "
        f"{options.workers} threads; GB/s of model, medians of {options.rounds}"
    )
    made, new, placed = [], [], []
    for row in rows:
        size, first = row["bytes"], f"{100 * row['changed']:g} %"
        rates = {
            stage: {name: size / value / 1e9 for name, value in row[stage].items()}
            for stage in ("create", "anew")
            if stage in row
        }
        create, sizes = rates["create"], row["sizes"]
        made.append([
            first, create["reference"], create["ours"], create["ours"] / create["reference"],
            create["packed"], *(percent(sizes[name] / size) for name in sizes),
        ])  # fmt: skip
        if "anew" in row:
            found = rates["anew"]
            new.append([
                first, *(found[name] for name in found),
                found["ours"] / found["reference"], found["ours"] / found["copy"],
                found["packed"] / found["copy"],
            ])  # fmt: skip
        if "in_place" in row:
            cells = (in_place_cells(size, row["in_place"][how]) for how in ("synced", "unsynced"))
            placed.append([first, *(cell for some in cells for cell in some)])
    table(f"Making weight versions, {what}",
          ["changed", "reference", "ours", "times", "packed", "size: reference", "ours", "packed"],
          made)  # fmt: skip
    if new:
        table(f"Applying to a new place, {what}",
              ["changed", "cp and sync", "reference", "ours", "packed", "ours / reference",
               "ours / cp and sync", "packed / cp and sync"], new)  # fmt: skip
    if placed:
        table(f"Changing a copy in place, {what}",
              ["changed", "reference", "ours", "times", "packed",
               "not synced: reference", "ours", "times", "packed"], placed)  # fmt: skip


def main() -> None:
    parser = version_options(gib=0.25, changed="1,2,3,5,10", rounds=3)
    parser.add_argument("--kind", choices=["steps", "any"], default="steps")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    count, each, shares = tensors_of(options)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        root = Path(folder)
        make(root / "base", count, each, lambda i: bf16_noise(each, i))
        rows = [run(root, count, share, options) for share in shares]
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        show(rows, options)


if __name__ == "__main__":
    main()

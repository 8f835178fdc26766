"""A pair shaped like Llama-3-70B (2 x 141 GB, sparse files) through `ckdiff diff -o`.

Checks that every planted change is found and nothing else, and prints speed and memory. With
--stores K it goes on to plant and diff K times, and runs `ckdiff overlap` over the K stores.

    python bench/shape70b.py [--dir DIR] [--workers N] [--stores K] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from common import Tensor, ckdiff, header, table, watch, watched_diff, write_index

import ckdiff as api

LAYERS, HIDDEN, INTER, KV, VOCAB, SHARDS = 80, 8192, 28672, 1024, 128256, 30


def tensors() -> list[Tensor]:
    """Names, dtypes and shapes of Llama-3-70B."""
    out: list[Tensor] = [("model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN))]
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        out += [
            (f"{at}.input_layernorm.weight", "BF16", (HIDDEN,)),
            (f"{at}.mlp.down_proj.weight", "BF16", (HIDDEN, INTER)),
            (f"{at}.mlp.gate_proj.weight", "BF16", (INTER, HIDDEN)),
            (f"{at}.mlp.up_proj.weight", "BF16", (INTER, HIDDEN)),
            (f"{at}.post_attention_layernorm.weight", "BF16", (HIDDEN,)),
            (f"{at}.self_attn.k_proj.weight", "BF16", (KV, HIDDEN)),
            (f"{at}.self_attn.o_proj.weight", "BF16", (HIDDEN, HIDDEN)),
            (f"{at}.self_attn.q_proj.weight", "BF16", (HIDDEN, HIDDEN)),
            (f"{at}.self_attn.v_proj.weight", "BF16", (KV, HIDDEN)),
        ]
    return [
        *out,
        ("model.norm.weight", "BF16", (HIDDEN,)),
        ("lm_head.weight", "BF16", (VOCAB, HIDDEN)),
    ]


def make(root: Path, every: list[Tensor]) -> dict[str, tuple[Path, int]]:
    """Sparse shards on both sides; gives for each tensor its tuned file and first byte."""
    each = -(-len(every) // SHARDS)
    places: dict[str, tuple[Path, int]] = {}
    for side in ("base", "tuned"):
        folder = root / side
        folder.mkdir()
        shards = {
            f"model-{s // each + 1:05d}-of-{SHARDS:05d}.safetensors": every[s : s + each]
            for s in range(0, len(every), each)
        }
        for file, members in shards.items():
            head, where, size = header(members)
            with open(folder / file, "wb") as f:
                f.write(head)
                f.truncate(size)
            places.update({name: (folder / file, a) for name, (a, _) in where.items()})
        write_index(folder, shards)
    return places


def plant(places: dict[str, tuple[Path, int]], seed: int = 70) -> dict[str, set[int]]:
    """Change single elements of the tuned side, among them some beyond 2**31, 2**32 and 2**36."""
    rng = np.random.default_rng(seed)
    order = sorted((t for t in tensors() if t[0] in places), key=lambda t: natural(t[0]))
    planted: dict[str, set[int]] = {}
    address = 0
    spots: list[tuple[str, int]] = []
    for name, _, shape in order:
        elements = int(np.prod(shape))
        spots += [(name, 0), (name, elements - 1)]  # both ends of every tensor
        spots += [(name, int(rng.integers(elements))) for _ in range(3)]
        for edge in (2**31, 2**32, 2**36, 2**36 + 2**26):
            for position in (edge - 1, edge, edge + 1):
                if address <= position < address + elements:
                    spots.append((name, position - address))
        address += -(-elements // 512) * 512
    for name, element in spots:
        file, start = places[name]
        with open(file, "r+b") as f:
            f.seek(start + 2 * element)
            f.write(b"\x80\x3f")
        planted.setdefault(name, set()).add(element)
    return planted


def natural(name: str) -> list[object]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def verify(path: Path, planted: dict[str, set[int]]) -> int:
    """Every planted bit and no other; gives the highest element address checked."""
    store = api.open_store(path)
    highest = 0
    for record in store.tensors:
        elements = planted.get(record.name, set())
        if record.changed["exact"] != len(elements):
            raise SystemExit(f"WRONG: {record.name} has {record.changed['exact']} changes")
        for element in elements:
            if not store.mask(record.name, start=element, stop=element + 1)[0]:
                raise SystemExit(f"WRONG: {record.name}[{element}] was not found")
            highest = max(highest, record.start + element)
    return highest


def overlap(
    root: Path,
    first: Path,
    places: dict[str, tuple[Path, int]],
    planted: dict[str, set[int]],
    count: int,
    workers: int,
) -> None:
    """Runs that each change what the one before changed and some more, and their overlap."""
    stores = [first.rename(root / "run0.zarr")]
    sizes = [sum(map(len, planted.values()))]
    for i in range(1, count):
        for name, elements in plant(places, 70 + i).items():
            planted[name] |= elements
        stores.append(watched_diff(root, workers=workers)[2].rename(root / f"run{i}.zarr"))
        sizes.append(sum(map(len, planted.values())))
    run = watch(ckdiff("overlap", *stores, "--json", "--workers", str(workers)))
    found = json.loads(run.stdout)
    for pair in found["rows"][0]["pairs"]:
        if pair["intersection"] != sizes[pair["a"]]:  # a later run holds all of an earlier one
            raise SystemExit(f"WRONG: {pair}")
    bits = count * found["rows"][0]["elements"] / 8
    table(
        f"Overlap of {count} Llama-3-70B shaped stores",
        ["what", "value"],
        [
            ["mask bits read", f"{bits / 1e9:.1f} GB, decoded"],
            ["intersections, all as planted", f"{len(found['rows'][0]['pairs'])}"],
            ["time", f"{found['seconds']:.1f} s"],
            ["speed", f"{bits / found['seconds'] / 1e9:.2f} GB/s of mask"],
            ["peak RssAnon", f"{run.rss_anon} MiB"],
            ["peak RSS", f"{run.rss} MiB"],
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", help="where the sparse files go (default: a temporary directory)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stores", type=int, default=0, help="also the overlap of so many stores")
    parser.add_argument("--quick", action="store_true", help="a part of a layer: a smoke test")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        root = Path(folder)
        chosen = [t for t in tensors() if not arguments.quick or ".layers.0.self_attn." in t[0]]
        places = make(root, chosen)
        planted = plant(places)
        on_disk = sum(f.stat().st_blocks * 512 for f in root.rglob("*.safetensors"))
        run, result, out = watched_diff(root, workers=arguments.workers)
        highest = verify(out, planted)
        changes = sum(map(len, planted.values()))
        assert result["rules"]["exact"]["changed"] == changes
        speed = result["bytes_read"] / result["seconds"] / 1e9
        store_size = sum(os.path.getsize(f) for f in out.rglob("*") if f.is_file())
        table(
            "Llama-3-70B shaped pair, holes",
            ["what", "value"],
            [
                ["bytes compared", f"{result['bytes_read'] / 1e9:.1f} GB"],
                ["on disk", f"{on_disk / 2**20:.1f} MiB"],
                ["planted changes, all found, no other", changes],
                ["highest planted address", f"2^{np.log2(highest):.2f}"],
                ["engine time", f"{result['seconds']:.1f} s"],
                ["speed", f"{speed:.2f} GB/s"],
                ["store", f"{store_size / 2**20:.1f} MiB"],
                ["peak RssAnon", f"{run.rss_anon} MiB"],
                ["peak RSS", f"{run.rss} MiB"],
            ],
        )
        if arguments.stores > 1:
            overlap(root, out, places, planted, arguments.stores, arguments.workers)


if __name__ == "__main__":
    main()

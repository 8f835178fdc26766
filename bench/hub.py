"""Streaming from the hub against downloading the same bytes with the same client.

    python bench/hub.py [--gib 1] [--density 0.1] [--rounds 3] [--disk 256MiB] [--json] [--quick]

A server on the loopback interface speaks the hub's API, in a process of its own; it is as fast as
Python's http.server is. "download" fetches both checkpoints with huggingface_hub into an empty
cache, one file after the other, and compares nothing. "download, then diff" is what `ckdiff diff`
does without --stream. The disk is what downloads took of it: the cache, and unnamed files.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from common import ckdiff, make_pair, median, table, watch

TESTS = Path(__file__).parent.parent / "tests" / "helpers"
SERVE = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hub_server import Hub, serving
hub = Hub()
for side in ("base", "tuned"):
    files = {f.name: f.read_bytes() for f in (Path(sys.argv[2]) / side).iterdir()}
    hub.put(f"bench/{side}", files)
with serving(hub):
    print(hub.endpoint, flush=True)
    sys.stdin.read()
"""
DOWNLOAD = """
from huggingface_hub import snapshot_download
for side in ("base", "tuned"):
    snapshot_download(f"bench/{side}", max_workers=1)
"""
PARALLEL = DOWNLOAD.replace("max_workers=1", "max_workers=8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Streaming against downloading.")
    parser.add_argument("--gib", type=float, default=1.0, help="of each side")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk", default="256MiB")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    a = parser.parse_args()
    if a.quick:
        a.gib, a.rounds = 0.125, 1
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_pair(root, a.gib, a.density)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(TESTS), folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            os.environ["HF_ENDPOINT"] = server.stdout.readline().strip()
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
            found = measure(root, a)
        finally:
            server.stdin.close()
            server.wait()
    if a.json:
        print(json.dumps(found))
        return
    least = found["download"]["seconds"]
    table(
        f"2 x {a.gib:g} GiB from a local hub, median of {a.rounds}",
        ["what", "s", "time / download", "peak RssAnon MiB", "peak disk MiB"],
        [
            [name, got["seconds"], got["seconds"] / least, got["rss_anon"], got["disk"]]
            for name, got in found.items()
        ],
    )


def measure(root: Path, a: argparse.Namespace) -> dict[str, dict[str, float]]:
    sides = ["hf://bench/base", "hf://bench/tuned"]
    out = root / "out.zarr"
    commands = {
        "download": [sys.executable, "-c", DOWNLOAD],
        "download, 8 at a time": [sys.executable, "-c", PARALLEL],
        "download, then diff": ckdiff("diff", *sides, "-o", out, "--overwrite"),
        "stream": ckdiff("diff", *sides, "-o", out, "--overwrite", "--stream", "--disk", a.disk),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    anon, disk = dict.fromkeys(commands, 0), dict.fromkeys(commands, 0)
    for _ in range(a.rounds):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory(dir=root) as cache:
                os.environ["HF_HOME"] = cache
                os.sync()
                began = time.perf_counter()
                ran = watch(list(map(str, command)), interval=0.02, probe=partial(on_disk, cache))
                seconds[name].append(time.perf_counter() - began)
                anon[name] = max(anon[name], ran.rss_anon)
                disk[name] = max(disk[name], ran.probed >> 20)
    return {
        n: {"seconds": median(seconds[n]), "rss_anon": anon[n], "disk": disk[n]} for n in commands
    }


def on_disk(cache: str, process: int) -> int:
    """Bytes on the disk of a cache, and of the unnamed files that a process has open."""
    blocks = 0
    for folder, _, names in os.walk(cache):
        for name in names:
            with suppress(OSError):  # files come and go
                blocks += os.lstat(os.path.join(folder, name)).st_blocks
    unnamed: dict[tuple[int, int], int] = {}
    with suppress(OSError):
        for number in os.listdir(f"/proc/{process}/fd"):
            with suppress(OSError):
                found = os.stat(f"/proc/{process}/fd/{number}")
                if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                    unnamed[found.st_dev, found.st_ino] = found.st_blocks
    return 512 * (blocks + sum(unnamed.values()))


if __name__ == "__main__":
    main()

"""What a publisher keeps in memory: its snapshot, and a bounded rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from source import ROOT

MIB = 1 << 20
SIZE = 320 * MIB

SCRIPT = """
import json, sys, threading, time
import numpy as np
from ckdiff.budget import resident_anonymous
from ckdiff.sync import Publisher

folder, kind, dtype = sys.argv[1:]
peak, ended = [0], threading.Event()

def watch():
    while not ended.wait(0.003):
        peak[0] = max(peak[0], resident_anonymous())

threading.Thread(target=watch, daemon=True).start()
raw = np.memmap(folder + "/weights", np.uint8, "r+")  # not anonymous
state = {f"w{i}": part.view(dtype) for i, part in enumerate(np.split(raw, 5))}
rng = np.random.default_rng(0)
with Publisher(folder + "/s", state, dtype="f16", snapshot=kind, workers=2) as publisher:
    for step in range(2):
        for one in state.values():
            one[rng.integers(0, len(one), len(one) // 100)] += 1
        found = publisher.publish(state)
ended.set()
print(json.dumps({"peak": peak[0], "density": found.density, "full": found.full}))
"""


@pytest.mark.parametrize(
    ("kind", "dtype", "snapshot"),
    [("memory", "float16", SIZE), ("disk", "float16", 0), ("memory", "float32", SIZE // 2)],
)
def test_memory_is_the_snapshot_and_a_bounded_rest(
    tmp_path: Path, kind: str, dtype: str, snapshot: int
) -> None:
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(SIZE)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, kind, dtype],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0.005 < found["density"] < 0.011
    assert not found["full"]
    assert snapshot < found["peak"] < snapshot + 256 * MIB, found["peak"] // MIB

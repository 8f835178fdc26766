"""A timeline of a stream keeps to the memory that it was given, whatever the model's size."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cli_support import MOST_MEMORY, python
from support import write_sparse

import ckdiff

MIB = 1 << 20
GIVEN = 160 * MIB

MADE = f"""
import json, sys
import ckdiff

workers = int(sys.argv[4])
made = ckdiff.timeline(sys.argv[1:3], sys.argv[3], stats=True, workers=workers, memory={GIVEN})
print(json.dumps([most(), made.final]))
"""


@pytest.mark.parametrize(("encoding", "workers", "dense"), [("xor", 2, 16), ("packed", 1, 4)])
def test_a_stream_keeps_to_its_memory(
    encoding: str, workers: int, dense: int, tmp_path: Path
) -> None:
    sizes = {"dense": dense * MIB, **{f"layers.{i}.w": 80 * MIB for i in range(2)}}
    tensors = {name: ("BF16", (size // 2,), size) for name, size in sizes.items()}
    rng, models = np.random.default_rng(0), []
    for side in range(4):
        edits = {
            name: {int(at): b"\x80" for at in rng.integers(0, size, 500 * side)}
            for name, size in sizes.items()
        }
        edits["dense"] = {0: rng.bytes(sizes["dense"])}
        models.append(tmp_path / f"m{side}.safetensors")
        write_sparse(models[-1], tensors, edits)
    stream = tmp_path / "stream"
    for number, (one, other) in enumerate(pairwise(models), 1):
        if number == 2 or encoding == "xor":
            ckdiff.delta(one, other, stream, encoding="xor", full=number == 2)
        else:
            ckdiff.delta(one, other, stream, encoding="packed", as_version=True)
    paths = [str(path) for path in (models[0], stream, tmp_path / "out")]
    done = python(MOST_MEMORY + MADE, *paths, str(workers))
    assert done.returncode == 0, done.stderr
    most, final = json.loads(done.stdout)
    assert final == ckdiff.diff(models[0], models[-1]).rules["exact"]["changed"]
    assert sum(sizes.values()) > GIVEN
    assert most <= GIVEN, f"{most // MIB} MiB"

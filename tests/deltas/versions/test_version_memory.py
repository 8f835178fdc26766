"""Commands on weight versions take no more memory for a larger model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from cli_support import MOST_MEMORY, python
from support import write_sparse

MIB = 1 << 20
MOST = 256 * MIB  # of any command, whatever the model

STEPS = """
import json, os, shutil, sys
import ckdiff
from ckdiff.deltas.versions.applying import apply_anew
from ckdiff.deltas.versions.writing import write_version

os.chdir(sys.argv[1])
base, one, two = "base.safetensors", "one.safetensors", "two.safetensors"
found = {}

def step(name, work):
    seen[0] = 0
    work()
    found[name] = most()
    for path in ("out", "out.delta"):
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.remove(path)

for encoding in ("xor", "overwrite"):
    for before, after in ((base, one), (one, two)):
        step(f"delta {encoding}", lambda: write_version(before, after, encoding, encoding=encoding))
    step(f"apply {encoding}", lambda: apply_anew(base, encoding, "out"))
    step(f"check {encoding}", lambda: ckdiff.check(encoding, base=base))
    last = f"{encoding}/weight_v000002"
    step(f"convert {encoding}",
         lambda: ckdiff.convert_delta(last, "out.delta", base=one, encoding="packed"))
step("squash", lambda: ckdiff.squash("xor", 1, 2, "out"))
ckdiff.delta(base, one, "packed")
step("convert packed", lambda: ckdiff.convert_delta("packed", "out", base=base, encoding="xor"))
os.mkdir("local")
os.rename(base, "local/model.safetensors")
step("in place", lambda: ckdiff.apply_in_place("local", "xor"))
print(json.dumps(found))
"""


def test_memory_of_commands_is_bounded(tmp_path: Path) -> None:
    """Of a model that is larger than what they may take, of which a part changed altogether."""
    sizes = {"dense": 32 * MIB, **{f"layers.{i}.w": 64 * MIB for i in range(4)}}
    tensors = {name: ("BF16", (size // 2,), size) for name, size in sizes.items()}
    rng = np.random.default_rng(0)
    write_sparse(tmp_path / "base.safetensors", tensors)
    for side in ("one", "two"):
        edits = {
            name: {int(at): b"\x80" for at in rng.integers(0, size, 2000)}
            for name, size in sizes.items()
        }
        edits["dense"] = {0: rng.bytes(sizes["dense"])}
        write_sparse(tmp_path / f"{side}.safetensors", tensors, edits)
    done = python(MOST_MEMORY + STEPS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 11
    assert sum(sizes.values()) > MOST
    assert {name: used // MIB for name, used in found.items() if used > MOST} == {}

"""The store without us: anything that reads Zarr and JSON can read a mask."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from checkpoint_pairs import some_model, write_side

import ckdiff

RULES = ["exact", "atol=1e-3", "exact@bf16"]
READER = """
import json, sys
from pathlib import Path
import numpy as np
import zarr

root = Path(sys.argv[1])
manifest = json.loads((root / "manifest.json").read_text("utf-8"))
columns = json.loads((root / "tensors.json").read_text("utf-8"))
group = zarr.open_group(str(root), mode="r")
out = {}
for rule in manifest["masks"]:
    flat = group[f"masks/{rule}"]
    assert flat.shape == (manifest["layout"]["addresses"] // 8,), flat.shape
    assert flat.dtype == np.uint8
    out[rule] = {}
    for name, elements, start in zip(columns["name"], columns["elements"], columns["start"]):
        assert start % 512 == 0
        packed = flat[start // 8 : start // 8 + -(-elements // 8)]
        bits = np.unpackbits(packed, count=elements, bitorder="little")
        out[rule][name] = bits.tolist()
assert "ckdiff" not in sys.modules
print(json.dumps(out))
"""


def test_masks_can_be_read_with_zarr_and_json_alone(tmp_path: Path) -> None:
    model = some_model(11)
    sides = [write_side(tmp_path / side, model, side, 3) for side in ("base", "tuned")]
    out = tmp_path / "out.zarr"
    ckdiff.diff(*sides, out, rules=RULES, memory="8GiB")
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, str(out)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert list(found) == RULES
    for name, pair in model.items():
        for rule, want in pair.masks(RULES).items():
            assert found[rule][name] == want.astype(int).tolist()


def test_what_the_json_files_say(tmp_path: Path) -> None:
    model = some_model(12)
    sides = [write_side(tmp_path / side, model, side, 4) for side in ("base", "tuned")]
    out = tmp_path / "out.zarr"
    result = ckdiff.diff(*sides, out, rules=["atol=0.001"], memory="8GiB")
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert manifest["format"] == "ckdiff-mask-store"
    assert manifest["format_version"] == 1
    assert manifest["ckdiff_version"] == ckdiff.__version__
    assert manifest["rules"] == ["atol=1e-3", "exact"]
    assert manifest["masks"] == ["atol=1e-3"]
    assert manifest["elements"] == sum(pair.elements for pair in model.values())
    assert manifest["tensors"] == len(model)
    assert manifest["changed"] == {r: c["changed"] for r, c in result.rules.items()}
    assert set(manifest["layout"]) >= {"addresses", "alignment", "chunk"}
    assert {"base", "tuned", "unpaired", "objects", "digest"} <= set(manifest)
    files = {str(p.relative_to(out)): p.stat().st_size for p in out.rglob("*") if p.is_file()}
    files.pop("manifest.json")
    assert {key: size for key, (size, _) in manifest["objects"].items()} == files
    # nothing that depends on when, where or how it was made
    text = json.dumps(manifest)
    for word in ("time", "date", "host", "worker", "seconds", str(tmp_path)):
        assert word not in text

    columns = json.loads((out / "tensors.json").read_text("utf-8"))
    for i, name in enumerate(columns["name"]):
        pair = model[name]
        assert columns["dtype"][i] == pair.dtype
        assert tuple(columns["shape"][i]) == pair.shape
        assert columns["elements"][i] == pair.elements
        assert columns["changed"]["atol=1e-3"][i] == int(
            pair.masks(["atol=1e-3"])["atol=1e-3"].sum()
        )
    assert {len(columns[key]) for key in ("name", "dtype", "shape", "elements", "start")} == {
        len(model)
    }

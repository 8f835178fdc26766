"""Two checkpoints through every command: right, or refused in one line; never a traceback."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cli_support import run

import ckdiff
from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.kernels.memory import views


@dataclass
class Pair:
    """A base and a tuned checkpoint, and what is said beside them."""

    base: Path | str
    tuned: Path | str
    options: Sequence[str] = ()  #: of diff alone
    found: dict[str, Any] = field(default_factory=dict)  #: the JSON of the last diff
    said: str = ""  #: its notes, hints and warnings

    @property
    def both(self) -> tuple[str, str]:
        """The two arguments."""
        return str(self.base), str(self.tuned)

    def diff(self, *more: str) -> dict[str, Any]:
        """Compare them; the JSON."""
        done = run("diff", *self.both, *self.options, *more, "--json")
        assert done.exit_code == 0, done.output
        assert "Traceback" not in done.stderr, done.stderr
        self.found, self.said = json.loads(done.stdout), done.stderr
        return self.found


def counts(pair: Pair, changed: int, elements: int, rule: str = "exact") -> str:
    """Hold what a diff counts against what is right; gives what it said."""
    found = pair.diff(*(() if rule == "exact" else ("--rule", rule)))
    assert (found["rules"][rule]["changed"], found["elements"]) == (changed, elements), pair.said
    return pair.said


def attempt(*arguments: str) -> bool:
    """Whether a command did it; otherwise it said why in one line."""
    done = run(*arguments)
    said = done.stderr.splitlines()
    assert "Traceback" not in done.stderr, f"{arguments}\n{done.stderr}"
    if done.exit_code == 0:
        return True
    assert done.exit_code == 2, (arguments, done.output)
    errors = [line for line in said if line.startswith("ckdiff: error: ")]
    assert len(errors) == 1, (arguments, done.output)
    assert "bug in ckdiff" not in errors[0], (arguments, done.output)
    # what is said before it are notes and the like, a line each
    assert all(line.startswith("ckdiff: ") for line in said), (arguments, done.output)
    return False


def through(pair: Pair, folder: Path) -> dict[str, bool]:
    """Every command that takes the pair or its store; which of delta and graft did it."""
    stores = [str(folder / f"{name}.zarr") for name in ("one", "two", "random")]
    plain = pair.diff()
    for store in stores[:2]:
        stored = pair.diff("-o", store)
        for key in ("rules", "elements", "tensors", "unpaired", "retyped", "resized", "tied"):
            assert stored[key] == plain[key], key
    _read_the_store(pair, stores)
    assert attempt("export", stores[0], "--to", "npz", "-o", str(folder / "m.npz"))
    with np.load(folder / "m.npz") as masks:
        marks = [masks[name] for name in masks if masks[name].dtype == bool]
        stored_masks = ckdiff.open_store(stores[0]).masks
        rule = "exact" if "exact" in stored_masks else stored_masks[0]
        assert sum(int(mask.sum()) for mask in marks) == plain["rules"][rule]["changed"]
    attempt("export", stores[0], "--like", str(pair.base), "-o", str(folder / "m.safetensors"))
    return {"delta": _there_and_back(pair, folder), "graft": _grafted(pair, folder, stores[0])}


def _changed(found: dict[str, Any]) -> int:
    return int(found["rules"]["exact"]["changed"])


def _read_the_store(pair: Pair, stores: list[str]) -> None:
    one, two, third = stores
    for by in ("tensor", "layer", "module", "dtype", "model"):
        done = run("show", one, "--by", by, "--json")
        assert done.exit_code == 0, done.output
        rows = json.loads(done.stdout)["rows"]
        changed = [row["rules"]["exact"]["changed"] for row in rows]
        assert sum(changed) == _changed(pair.found)
    for command in (["show", one], ["check", one], ["info", one]):
        assert attempt(*command)
    for side in pair.both:
        attempt("info", side)
    assert attempt("random", "--like", one, "--seed", "1", "-o", third)
    done = run("overlap", one, two, third, "--json")
    assert done.exit_code == 0, done.output
    overlap = json.loads(done.stdout)
    (row,) = (row for row in overlap["rows"] if row["group"] == "model")
    changed = pair.found["rules"][overlap["rule"]]["changed"]
    assert row["sizes"] == [changed] * 3
    assert row["pairs"][0]["intersection"] == changed


def tensors_of(path: Path | str) -> dict[str, tuple[Any, ...]]:
    """Every tensor of a checkpoint: dtype, shape and bytes."""
    with open_checkpoint(path) as opened:
        opened.fetch()
        table, reader = opened.table, opened.reader()
        found = {}
        for i, name in enumerate(table.names):
            size = table.nbytes[i : i + 1]
            columns = np.array([i], np.int64), np.zeros(1, np.int64)
            (data,) = views(reader.acquire(*columns, size), size)
            found[name] = table.dtypes[i], table.shapes[i], data.tobytes()
            reader.release()
        reader.close()
        return found


def _there_and_back(pair: Pair, folder: Path) -> bool:
    """A delta and its result, which is the tuned side bit for bit."""
    delta, out = str(folder / "x.delta"), folder / "applied"
    if not attempt("delta", *pair.both, "-o", delta):
        return False
    path = str(pair.tuned)
    single = not path.startswith("hf:") and not Path(path).is_dir() and "index" not in path
    target = out.with_suffix(".safetensors") if single else out
    if not attempt("apply", str(pair.base), delta, "-o", str(target)):
        raise AssertionError("a delta was made that is not applied")
    assert tensors_of(target) == tensors_of(pair.tuned)
    # files that were safetensors are the same to the last byte
    for made in target.rglob("*.safetensors") if target.is_dir() else ():
        meant = Path(pair.tuned) / made.relative_to(target)
        assert not meant.exists() or made.read_bytes() == meant.read_bytes(), made
    return True


def _grafted(pair: Pair, folder: Path, store: str) -> bool:
    """A graft of what changed, which differs from the tuned side in nothing that it took."""
    out = folder / "grafted"
    path = str(pair.base)
    single = not path.startswith("hf:") and not Path(path).is_dir() and "index" not in path
    target = out.with_suffix(".safetensors") if single else out
    if not attempt("graft", *pair.both, "--mask", store, "-o", str(target)):
        return False
    if not any("adapter" in option for option in pair.options):  # the mask is of another base then
        _check_graft(pair, target, store)
    return True


def _check_graft(pair: Pair, target: Path, store: str) -> None:
    """What a graft changed of the base is what the mask says, where dtypes and rows agree."""
    other = {one["name"] for key in ("retyped", "resized") for one in pair.found[key]}
    wanted = {r.name: r.changed["exact"] for r in ckdiff.open_store(store).tensors}
    found = ckdiff.diff(pair.base, target)
    for record in found.table:
        if record.name in wanted and record.name not in other:
            assert record.changed["exact"] == wanted[record.name], record.name
    if not other:  # whatever the names are under which the base has them
        assert found.rules["exact"]["changed"] == sum(wanted.values())

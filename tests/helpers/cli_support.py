"""Checkpoints and ways to run the command, for the tests of the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from support import Tensor, write_safetensors

import ckdiff
from ckdiff.cli import main

Pair = tuple[str, str]
PACKAGE = Path(ckdiff.__file__).parent.parent


def bf16(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).integers(0x3C00, 0x3F80, shape, np.uint16)
    return "BF16", shape, values.tobytes()


def bump(tensor: Tensor, elements: int) -> Tensor:
    """The tensor with its first ``elements`` elements moved by one representable value."""
    values = np.frombuffer(tensor[2], np.uint16).copy()
    values[:elements] += 1
    return tensor[0], tensor[1], values.tobytes()


def model() -> dict[str, Tensor]:
    tensors = {"model.embed_tokens.weight": bf16((32, 64))}
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = bf16((64, 64), layer)
        for expert in range(2):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            tensors[name] = bf16((16, 64), 10 * layer + expert)
    return tensors


def write_pair(folder: Path) -> Pair:
    """Two small checkpoints: 4 of 10 tensors and 4096 + 10 + 20 + 30 elements differ."""
    base = model()
    tuned = dict(base)
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.experts.1.up_proj.weight"
        tuned[name] = bump(base[name], 10 * (layer + 1))
    name = "model.layers.2.self_attn.q_proj.weight"
    tuned[name] = bump(base[name], 4096)
    return (
        str(write_safetensors(folder / "base.safetensors", base)),
        str(write_safetensors(folder / "tuned.safetensors", tuned)),
    )


def run(*args: str) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, args)


def ok(*args: str) -> Result:
    """A command that must succeed."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def error(*args: str, code: int = 2) -> str:
    """The one line that a failing command prints."""
    result = run(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("ckdiff: error: ")
    return line.removeprefix("ckdiff: error: ")


def python(code: str, *args: str, **extra: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the package."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), **extra.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **extra,
    )


#: begins a script: ``most()`` is the most anonymous memory that its process had so far, in bytes
MOST_MEMORY = """
import threading, time
from ckdiff import budget
seen = [0]
def most():
    seen[0] = max(seen[0], budget.resident_anonymous())
    return seen[0]
def watch():
    while True:
        most()
        time.sleep(0.003)
threading.Thread(target=watch, daemon=True).start()
"""

MAIN = "import sys; from ckdiff.cli import main; main(sys.argv[1:])"


#: stands for a signal at the worst moment: when a chunk was recorded, and nothing after it
_STOPPED = """
import os, signal, sys
from ckdiff.stores.workdir import WorkDir
from ckdiff.cli import main
record = WorkDir.record
def stop(self, chunk, payload):
    record(self, chunk, payload)
    os.kill(os.getpid(), int(sys.argv[1]))
WorkDir.record = stop
main(sys.argv[2:])
"""


#: another one: when everything was written, and is to be given its name
_STOPPED_AT_THE_END = """
import os, signal, sys
from ckdiff.outputs.place import Place
from ckdiff.cli import main
def commit(self):
    os.kill(os.getpid(), int(sys.argv[1]))
Place.commit = commit
main(sys.argv[2:])
"""


def stopped(number: signal.Signals, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that gets a signal when its first chunk was recorded."""
    return python(_STOPPED, str(int(number)), *arguments)


def stopped_at_the_end(number: signal.Signals, *arguments: str) -> None:
    """Run a command that gets a signal right before its output is in its place."""
    done = python(_STOPPED_AT_THE_END, str(int(number)), *arguments)
    if number == signal.SIGKILL:
        assert done.returncode == -number, done.stderr
    else:
        assert done.returncode == 130
        assert done.stderr.splitlines()[-1] == "ckdiff: error: interrupted (nothing was written)"


def interrupted(
    pair: Pair, out: Path, number: signal.Signals, *more: str
) -> subprocess.CompletedProcess[str]:
    return stopped(number, "diff", *pair, "-o", str(out), *more)

"""What `make demo` shows: which weights reinforcement learning changed in a small real model.

Runs the ckdiff command on the checkpoints beside this file, prints each command before its output,
and leaves the mask stores in `demo-out/`. No torch needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE / "checkpoints"
OUT = Path("demo-out")


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def ckdiff(*arguments: str | Path, show: bool = True) -> str:
    """Run a ckdiff command; show it and its output, or give its output."""
    words = [os.path.relpath(a) if isinstance(a, Path) else a for a in arguments]
    command = [sys.executable, "-m", "ckdiff", *words]
    if show:
        print(f"\n$ ckdiff {' '.join(words)}", flush=True)
    done = subprocess.run(command, stdout=None if show else subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # the command has said why
    return done.stdout or ""


def main() -> None:
    OUT.mkdir(exist_ok=True)
    base = CHECKPOINTS / "base"

    say("1. Which weights did 150 steps of RL change? (bfloat16 checkpoints)")
    rl = OUT / "rl_seed1.zarr"
    ckdiff("diff", base, CHECKPOINTS / "rl_seed1", "-o", rl, "--rule", "exact", "--rule",
           "atol=1e-5", "--overwrite")  # fmt: skip

    say("2. Where? By module, across layers")
    ckdiff("show", rl, "--by", "module")

    say("3. The same run in float32: how much of the sparsity is bfloat16 rounding?")
    ckdiff("diff", CHECKPOINTS / "base_fp32", CHECKPOINTS / "rl_seed1_fp32", "--rule",
           "exact@bf16", "--rule", "exact")  # fmt: skip

    say("4. Another seed, and a supervised run of the same length")
    rows = []
    for name in ("rl_seed1", "rl_seed2", "sft"):
        store = OUT / f"{name}.zarr"
        if store != rl:
            ckdiff("diff", base, CHECKPOINTS / name, "-o", store, "--overwrite", "--json",
                   show=False)  # fmt: skip
        model = json.loads(ckdiff("show", store, "--by", "model", "--json", show=False))
        exact = model["rows"][0]["rules"]["exact"]
        rows.append(f"  {name:<10} {exact['changed']:>8,} changed   density {exact['density']:.4f}")
    print("\n".join(rows))

    say("5. Do runs change the same weights, and more of them than chance would have it?")
    runs = [OUT / f"{name}.zarr" for name in ("rl_seed1", "rl_seed2", "sft")]
    nulls = ["--null", "tensor", "--null", "magnitude", "--null", "rowcol", "--base", base]
    ckdiff("overlap", *runs, *nulls, "--by", "module", "--top", "3")

    say("6. The control: a random mask with as many changed elements in each tensor as rl_seed2")
    control = OUT / "control.zarr"
    ckdiff("random", "--like", runs[1], "--seed", "1", "-o", control, "--overwrite")
    ckdiff("overlap", rl, control, *nulls, "--by", "model")

    say("7. What every run changed, as a mask of its own")
    ckdiff("combine", "intersection", *runs, "-o", OUT / "common.zarr", "--overwrite")

    say("8. Every byte of a store can be verified")
    ckdiff("check", rl)

    say("9. All of it as a page to look at, and to pass on")
    page = OUT / "report.html"
    ckdiff("report", *runs, "--base", base, "-o", page)

    print(
        f"\nOpen {page} in a browser: it needs no network and no other file.\n"
        "The masks are in demo-out/. In Python:\n"
        "    import ckdiff\n"
        '    store = ckdiff.open_store("demo-out/rl_seed1.zarr")\n'
        '    store.mask("model.layers.0.self_attn.q_proj.weight")    # bool, the tensor\'s shape\n'
        "examples/tiny_rl/README.md says how the checkpoints were made and what they do not show.\n"
        "`make paper` trains ten algorithms and judges what the papers claim: docs/paper.md."
    )


if __name__ == "__main__":
    main()

"""Try every command where only ckdiff-core is installed: python package/trial.py PROGRAM.

PROGRAM is the ``ckdiff`` of such an environment. Each command must do its work, or say in one line
what is to be installed for it; with machine code of all kernels beside it (package/build.py makes
it) nothing asks for a compiler. It takes half a minute, and a torch to write files with.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

#: a command, and after ``=>`` what its error says to install
COMMANDS = """
--version
diff base tuned -o one.zarr --rule exact --rule atol=1e-5 --rule rtol=1e-3 --rule ulp=1 --stats
diff base other -o two.zarr
diff base_fp32 tuned_fp32 --rule exact@bf16 --rule ulp=2@f16 --rule atol=1e-5@f32
diff base tuned_fp32 -o retyped.zarr --rule atol=1e-5
diff old grown --common-rows --stats -o rows.zarr
diff fp8 fp8-tuned --dequantize -o values.zarr
diff old old --tuned-adapter adapter
diff base tuned --junit ci.xml --markdown ci.md --fail-above 0.9
diff base tuned --dry-run
diff base.pt tuned.pt
diff base tuned --device cuda => 'ckdiff-core[gpu]'
diff base tuned --scheduler tcp://127.0.0.1:9 => 'ckdiff-core[cluster]'
diff base hf://some/model => 'ckdiff-core[full]'
show one.zarr --by tensor --csv
overlap one.zarr two.zarr --base base --null tensor --null magnitude --null rowcol --by module
overlap one.zarr two.zarr --base base --tuned tuned --tuned other --json
timeline base tuned other -o run.timeline --stats
timeline checkpoint-0 checkpoint-100 checkpoint-200 -o no-moves.timeline --no-first-moves
show run.timeline/masks/step-00001.zarr
structure one.zarr two.zarr -o profiles.safetensors
structure one.zarr --base base --tuned tuned
spectrum base tuned --sample 1 --angles 2
spectrum base tuned --device cuda => 'ckdiff-core[torch]'
report one.zarr two.zarr run.timeline --base base -o report.html => 'ckdiff-core[report]'
combine intersection one.zarr two.zarr -o both.zarr
combine difference one.zarr two.zarr -o first.zarr
combine symmetric-difference one.zarr two.zarr -o odd.zarr
combine at-least=2 one.zarr two.zarr both.zarr -o most.zarr
random --like one.zarr --seed 7 -o random.zarr
random --like one.zarr --seed 7 --within model -o anywhere.zarr
principal base --like one.zarr --kind principal --alpha 0.1 -o principal.zarr
principal base --like one.zarr --kind low --alpha 0.1 -o low.zarr
delta base tuned -o tuned.delta
delta base tuned -o indices.delta --encoding indices
delta base tuned -o masked.delta --mask both.zarr
delta base_fp32 tuned_fp32 -o wide.delta
delta base tuned -o stream --encoding xor
delta tuned other -o stream --encoding overwrite
delta other base -o stream --encoding packed --as-version
delta base tuned -o stream --encoding xor --full
delta base tuned -o blake --encoding xor --checksum blake3 => 'ckdiff-core[blake3]'
delta base tuned -o adler --encoding overwrite --checksum adler32
convert-delta tuned.delta --base base --encoding xor -o converted
convert-delta stream/weight_v000001 --base base --encoding packed -o packed.delta
squash stream 1 2 --base base -o squashed
apply base tuned.delta -o applied
apply base_fp32 wide.delta -o wide
apply base stream -o newest
apply local stream --in-place
check one.zarr
check run.timeline
check tuned.delta --base base
check stream --base base
check tuned.delta --manifest tuned.manifest
graft base tuned --mask both.zarr -o grafted
graft base tuned --mask random.zarr -o control
convert base_fp32 -o narrow --dtype bf16
convert base_fp32 -o f16 --dtype f16
convert fp8 -o again
export one.zarr -o masks.safetensors
export one.zarr -o packed.safetensors --packed
export one.zarr -o masks.npz
export one.zarr -o positions.safetensors --to indices
export one.zarr -o masks.pt => 'ckdiff-core[torch]'
import masks.safetensors -o from-bools.zarr --base base
import positions.safetensors -o from-positions.zarr
import masks.npz -o from-npz.zarr
import mask.pt -o from-torch.zarr --invert
import stream/weight_v000002 -o from-version.zarr --base base
info base
info tuned.pt
convert tuned.pt -o from-torch
info one.zarr
info tuned.delta
info stream
info run.timeline
info hf://some/model => 'ckdiff-core[full]'
clean .
"""


class Trial(NamedTuple):
    """A command, and what its error must say; None where it must do its work."""

    words: list[str]
    lacks: str | None


class Said(NamedTuple):
    """What a command gave back."""

    code: int
    stderr: str


def trials() -> Iterator[Trial]:
    """All commands, in the order in which one needs what another made."""
    for line in COMMANDS.strip().splitlines():
        command, _, lacks = line.partition(" => ")
        yield Trial(shlex.split(command), lacks or None)


def prepare(folder: Path) -> None:
    """Put the checkpoints into a folder."""
    models, small = ROOT / "examples/tiny_rl/checkpoints", ROOT / "tests/data/format-2"
    names = {"rl_seed1": "tuned", "rl_seed2": "other", "rl_seed1_fp32": "tuned_fp32"}
    for name in ("base", "base_fp32", *names):
        shutil.copytree(models / name, folder / names.get(name, name))
    for name in ("old", "grown", "fp8", "fp8-tuned", "adapter"):
        shutil.copytree(small / name, folder / name)
    for step in (0, 100, 200):
        shutil.copytree(small / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copytree(folder / "base", folder / "local")
    import torch

    # what a training loop saves, and a mask of another tool
    for file, value in (("base.pt", 0.5), ("tuned.pt", 0.75), ("mask.pt", True)):
        torch.save({"q_proj.weight": torch.full((8, 8), value)}, folder / file)


def wrong(trial: Trial, said: Said) -> str | None:
    """What is wrong with what a command gave back; None where it is as it must be."""
    if trial.lacks is None:
        return None if said.code == 0 else f"exit {said.code}: {said.stderr.strip()}"
    lines = [line for line in said.stderr.splitlines() if not line.startswith("ckdiff: note")]
    if said.code != 2 or len(lines) != 1 or trial.lacks not in lines[0]:
        return f"exit {said.code}, wanted one line with {trial.lacks}: {said.stderr.strip()}"
    return None


def tried(run: Callable[[list[str]], Said]) -> dict[str, str]:
    """Command -> what is wrong with it, of all commands that ``run`` runs."""
    found = ((shlex.join(trial.words), wrong(trial, run(trial.words))) for trial in trials())
    return {command: what for command, what in found if what is not None}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} PROGRAM")
    program = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        # nothing leads elsewhere, and a kernel that was compiled would be kept in that folder
        alone = {"PATH": os.defpath, "HOME": made, "NUMBA_CACHE_DIR": f"{made}/kernels"}

        def run(words: list[str]) -> Said:
            done = subprocess.run(
                [program, *words], cwd=folder, env=alone, capture_output=True, text=True
            )
            return Said(done.returncode, done.stderr)

        failed = tried(run)
        if (folder / "kernels").exists():
            failed["all of them"] = "a kernel was compiled"
    for command, what in failed.items():
        print(f"ckdiff {command}\n    {what}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

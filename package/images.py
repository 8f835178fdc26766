"""Compile kernels for one level of processors: python package/images.py LEVEL FILE [KERNEL]...

Without kernels it is all of them, which takes a minute or two. A kernel is a name and its kind,
such as "compare W16:exact". One process, one level: numba is told of it when it is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ckdiff.kernels import compiled, kinds, numbaview, shipped
from ckdiff.kernels.abi import SIGNATURES


def make(level: str, file: Path, wanted: set[str]) -> None:
    """Write the archive of a level. What only a linker could load is left out, and said."""
    chosen = next(known for known in shipped.LEVELS if known.name == level)
    numbaview.told |= {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": chosen.told}
    from ckdiff.kernels import codegen

    made = {}
    for name, kind in kinds.every():
        title = f"{name} {kind}".strip()
        if wanted and title not in wanted:
            continue
        try:
            found = codegen.compile_kernel(name, kind, SIGNATURES[name])
            made[name, kind] = compiled.image_of(found)
        except ValueError as error:
            print(f"{level}: {title} is left out: {error}", file=sys.stderr)
    shipped.write(file, compiled.sources(), made)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), set(sys.argv[3:]))

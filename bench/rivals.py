"""What people do today, as commands: `python bench/rivals.py numpy|torch|isclose BASE TUNED`.

Each prints the number of changed elements, so that a benchmark can check that it did the work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

SLICE = 1 << 21  # bytes of a slice in the chunked numpy count


def shards(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def numpy_chunked(base: str, tuned: str) -> int:
    """memmap both sides, compare in 2 MiB slices; assumes the same files on both sides."""
    import numpy as np

    changed = 0
    for a, b in zip(shards(base), shards(tuned), strict=True):
        start = 8 + int.from_bytes(a.open("rb").read(8), "little")
        json.loads(a.open("rb").read(start)[8:])
        left, right = (np.memmap(f, np.uint16, "r", offset=start) for f in (a, b))
        for i in range(0, len(left), SLICE // 2):
            changed += int(np.count_nonzero(left[i : i + SLICE // 2] != right[i : i + SLICE // 2]))
    return changed


def _tensor_pairs(base: str, tuned: str) -> Iterator[tuple[object, object]]:
    from safetensors import safe_open

    for a, b in zip(shards(base), shards(tuned), strict=True):
        with safe_open(a, "pt") as left, safe_open(b, "pt") as right:
            for name in left.keys():  # noqa: SIM118 - not a dict
                yield left.get_tensor(name), right.get_tensor(name)


def torch_exact(base: str, tuned: str) -> int:
    """safe_open, one tensor at a time, (a != b).sum()."""
    return sum(int((a != b).sum()) for a, b in _tensor_pairs(base, tuned))  # type: ignore[attr-defined]


def torch_isclose(base: str, tuned: str) -> int:
    """The same, and torch.isclose with an absolute tolerance of 1e-5."""
    import torch

    changed = 0
    for a, b in _tensor_pairs(base, tuned):
        changed += int((a != b).sum())  # type: ignore[attr-defined]
        torch.isclose(a, b, rtol=0, atol=1e-5).sum()  # type: ignore[arg-type]
    return changed


RIVALS = {"numpy": numpy_chunked, "torch": torch_exact, "isclose": torch_isclose}

if __name__ == "__main__":
    print(RIVALS[sys.argv[1]](sys.argv[2], sys.argv[3]))

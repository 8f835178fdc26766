"""The twin of the kernel that finds sequences, a byte at a time."""

from __future__ import annotations


def naive_runs(
    base: bytes, tuned: bytes, block: int, width: int
) -> tuple[bytes, list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]]:
    """Literals, sequences, and after each block: literals, sequences, changed elements and bytes.

    Runs of at least four zeros are one literal zero and a match; all other bytes are literals.
    """
    exclusive = bytes(a ^ b for a, b in zip(base, tuned, strict=True))
    literals = b""
    sequences: list[tuple[int, int, int, int]] = []
    ends = []
    for first in range(0, len(exclusive), block):
        part, at, pending = exclusive[first : first + block], 0, 0
        while at < len(part):
            stop = at
            while stop < len(part) and not part[stop]:
                stop += 1
            zeros = stop - at
            if zeros >= 4:
                literals += b"\0"
                sequences.append((1, pending + 1, zeros - 1, 0))
                pending = 0
                at = stop
            else:
                taken = max(zeros, 1)
                literals += part[at : at + taken]
                pending += taken
                at += taken
        sequences.append((0, pending, 0, 0))
        done = exclusive[: first + len(part)]
        elements = sum(any(done[i : i + width]) for i in range(0, len(done), width))
        ends.append((len(literals), len(sequences), elements, len(done) - done.count(0)))
    return literals, sequences, ends

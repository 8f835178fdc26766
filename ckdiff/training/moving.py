"""Taking selected elements out of tensors and putting them back: compiled on CPUs, else torch."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.kernels.moving import WIDTHS, Job, mover
from ckdiff.training.selection import Selection

_SHARE = 8  # tiles that are worth a thread


class Move(NamedTuple):
    """Two tensors and the compact tensors of their selected elements.

    All are of one dtype and device. The compact ones are contiguous, have one dimension, and may be
    longer than the selection; gathering sets what is left over to zero.
    """

    selection: Selection
    whole: torch.Tensor
    other: torch.Tensor
    compact: torch.Tensor
    beside: torch.Tensor


def gather(moves: Sequence[Move]) -> None:
    """Fill the compact tensors of both: ``whole`` to ``compact``, ``other`` to ``beside``."""
    for width, some in _by_width(moves, both=True).items():
        if width:
            _run("gather", width, some)
            continue
        for move in some:
            index = move.selection.index(move.whole.device)
            for whole, compact in ((move.whole, move.compact), (move.other, move.beside)):
                torch.index_select(whole.reshape(-1), 0, index, out=compact[: len(index)])
                compact[len(index) :] = 0


def scatter(moves: Sequence[Move]) -> None:
    """Put ``compact`` back to ``whole``; ``other`` is left alone."""
    for width, some in _by_width(moves, both=False).items():
        if width:
            _run("scatter", width, some)
            continue
        for move in some:
            whole = move.whole
            index = move.selection.index(whole.device)
            flat = whole.reshape(-1)  # a copy where the tensor is not contiguous
            flat.scatter_(0, index.long(), move.compact[: len(index)])
            if not whole.is_contiguous():
                whole.copy_(flat.view(whole.shape))


def _by_width(moves: Sequence[Move], *, both: bool) -> dict[int, list[Move]]:
    """Moves by the kernel that does them: bytes of an element, 0 for none."""
    found: dict[int, list[Move]] = defaultdict(list)
    for move in moves:
        some = len(move.selection.tiles) > 0
        simple = some and _simple(move.whole) and (not both or _simple(move.other))
        found[move.whole.element_size() if simple else 0].append(move)
    return found


def _simple(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.element_size() in WIDTHS
    )


def _run(name: Literal["gather", "scatter"], width: int, moves: Sequence[Move]) -> None:
    """Run a kernel over the tiles of all moves, in even shares on torch's number of threads."""
    tiles = sum(len(move.selection.tiles) for move in moves)
    threads = max(1, min(torch.get_num_threads(), tiles // _SHARE))
    edges = [tiles * i // threads for i in range(1, threads + 1)]
    shares: list[list[Job]] = [[]]
    done = 0
    for selection, *tensors in moves:
        whole, other, compact, beside = (_bytes(tensor) for tensor in tensors)
        count = len(selection.tiles)
        first = 0
        while first < count:
            if done == edges[len(shares) - 1]:
                shares.append([])
            some = min(count - first, edges[len(shares) - 1] - done)
            last = first + some == count
            padding = tensors[2].numel() - selection.count if last else 0
            mine = selection.tiles[first : first + some]
            job = Job(whole, other, compact, beside, mine, selection.places, padding)
            shares[-1].append(job)
            first += some
            done += some
    side_by_side([mover(name, width, share) for share in shares])


def _bytes(tensor: torch.Tensor) -> Bytes:
    size = tensor.numel() * tensor.element_size()
    return bytes_at(tensor.data_ptr(), size, writable=True)


def side_by_side(work: Sequence[Callable[[], object]]) -> None:
    """Do all of the work, the first here and the others in threads."""
    here, *rest = work
    others = [_pool(len(rest)).submit(item) for item in rest]
    try:
        here()
    finally:  # the memory that they work on must outlive them
        for other in others:
            other.result()


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "ckdiff-moving")


# Threads do not survive a fork, and a pool would wait for its own for ever.
os.register_at_fork(after_in_child=_pool.cache_clear)

"""Taking chosen elements of arrays out, and putting them back to their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from ckdiff.kernels.abi import JOB_COLUMNS, PLACES_MARGIN, TILE_COLUMNS
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, Bytes, Int64, place, room, within

WIDTHS = (2, 4, 8)  #: bytes of the elements that there are kernels for


class Job(NamedTuple):
    """Some tiles of two arrays, and the compact arrays of their chosen elements, all as bytes.

    Tiles and places are as in :mod:`ckdiff.kernels.abi`; ``padding`` is how many zeros are written
    after the last element.
    """

    whole: Bytes
    other: Bytes
    compact: Bytes
    beside: Bytes
    tiles: Int64
    places: Bytes
    padding: int


def mover(
    name: Literal["gather", "scatter"], width: int, jobs: Sequence[Job]
) -> Callable[[], object]:
    """What does these jobs when it is called, for elements of ``width`` bytes.

    ``gather`` takes from ``whole`` and ``other`` to ``compact`` and ``beside``; ``scatter`` puts
    ``compact`` back to ``whole``. The arrays must stay until it was called.
    """
    if width not in WIDTHS:
        raise ValueError(f"there is no kernel for elements of {width} bytes")
    table = np.array([_row(job, width) for job in jobs], np.int64).reshape(-1, JOB_COLUMNS)
    return partial(_run, c_function(name, str(width)).ctypes, table)


def _run(function: Callable[[int, int], None], table: Int64) -> None:
    function(place(table, I64), len(table))


def _row(job: Job, width: int) -> tuple[int, ...]:
    tiles, places = place(job.tiles, I64), place(job.places, U8)
    if job.tiles.shape[1] != TILE_COLUMNS or len(job.other) != len(job.whole):
        raise ValueError(f"tiles have {TILE_COLUMNS} columns, and two arrays one size")
    if len(job.tiles):  # they lie in order
        first, at, where, amount = job.tiles[-1].tolist()
        within(first, first + 1, len(job.whole) // width)
        within(at, at + max(amount, 1) + job.padding, len(job.compact) // width)
        within(where, where + max(2 * amount, -8 * amount) + PLACES_MARGIN, len(job.places))
    arrays = [room(array, U8) for array in (job.whole, job.other, job.compact)]
    beside = room(job.beside, U8, len(job.compact))
    return (*arrays, beside, tiles, places, len(job.tiles), job.padding)

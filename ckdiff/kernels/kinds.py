"""All kernels there are, for whoever makes them ahead: names, and the kinds they are asked for in.

A kind that nobody lists here works as well, where numba is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import casting, moving, runs, scaling
from ckdiff.kernels.abi import SIGNATURES
from ckdiff.kernels.binding import bind
from ckdiff.rules import ROUNDED, Rule

_MOST_STORES = 64  # that are walked together
_RULES = ("exact", "atol=1", "rtol=1e-3", "ulp=1")
_WIDTHS = (1, 2, 4, 8)  # bytes of elements and of lanes
_PICKED = 4  # bytes of the widest elements of which every second one is taken


def every() -> Iterator[tuple[str, str]]:
    """(name, kind) of each kernel; the kind is empty where there are none."""
    known = _kinds()
    for name in SIGNATURES:
        for kind in sorted(set(known.get(name, [""]))):
            yield name, kind


def _kinds() -> dict[str, Iterable[str]]:
    numeric = [dtype.name for dtype in DTYPES.values() if dtype.numeric]
    bits = [str(8 * width) for width in _WIDTHS]
    lanes = [f"{width}{kind}" for width in bits for kind in "fi"]
    # how many bits the number of stores has
    planes = [str(count) for count in range(2, _MOST_STORES.bit_length() + 1)]
    moved = [str(width) for width in moving.WIDTHS]
    return {
        "agree": ("1", *planes),  # the ones of a store by itself are counted too
        "blend": bits,
        "cells": DTYPES,
        "combine": ("difference", "odd", *(f"at-least:{count}" for count in planes)),
        "compare": _compared(),
        "encode": ("1", "2"),
        "gather": moved,
        "merge": lanes,
        "moves": ("0", "8", "16"),
        "narrow": _narrowed(),
        "paths": numeric,
        "runs": [str(width) for width in runs.WIDTHS],
        "scale": scaling.QUANTISED,
        "scatter": moved,
        "split": lanes,
        "statistics": numeric,
        "strided": _strided(),
        "sweep": [f"W{width}:exact" for width in bits],
        "tally": lanes,
        "units": ("", "1", "2", "groups", "halves", *casting.FUSED),
        "widen": _widened(),
    }


def _compared() -> Iterator[str]:
    for dtype in DTYPES.values():
        for text in _RULES:
            for target in ("", *(f"@{name}" for name in ROUNDED)):
                yield bind(Rule.parse(text + target), dtype).kind


def _strided() -> Iterator[str]:
    yield "runs"
    for width in _WIDTHS:
        for way, every_element in (("lines", 0), ("tiles", 1)):
            yield f"{way} {width},{every_element}"
            if width <= _PICKED:
                yield f"{way} {width},2"
        if width <= _PICKED:
            yield f"woven {width},1"


def _widened() -> Iterator[str]:
    for source in DTYPES.values():
        for target in DTYPES.values():
            if target is not source and target.holds(source):
                yield f"{source.name}>{target.name}"


def _narrowed() -> Iterator[str]:
    for source in DTYPES.values():
        for target in DTYPES.values():
            floats = source.kind == target.kind == "float" and source is not target
            if floats and source.bits >= 16 and not target.holds(source):
                yield f"{source.name}>{target.name}"

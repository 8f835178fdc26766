"""``tensors.json`` -> the table of tensors: every value is checked here, once, for all readers.

As in :mod:`ckdiff.stores.schema`, digests are not enough: whoever changes a table can make new
ones. A table is columns of up to some hundred thousand values, so that whole columns are looked at,
never a value at a time. Functions raise ValueError with a phrase for the caller's own error.
"""

from __future__ import annotations

import json
import math
import re
from itertools import chain
from operator import eq, lt, ne
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DTYPES, common
from ckdiff.layout import Layout
from ckdiff.stores.naturalorder import ascending
from ckdiff.stores.schema import (
    LARGEST_TABLE,
    MOST_DIMENSIONS,
    MOST_ELEMENTS,
    needs_newer,
    object_of,
    shown,
)
from ckdiff.stores.sealed import unique_keys, weight
from ckdiff.stores.table import UNKNOWN, IntArray, MaskTable, Statistics

_HEAVIEST = 1 << 29  # bytes that a table may take in memory: some 400,000 tensors
_LIGHT = 1 << 24  # bytes of JSON that are never that heavy, unless they are nothing but lists
_MOST_LISTS = 1 << 21  # shapes and histograms; brackets in names count as well

_COLUMNS = ("name", "dtype", "shape", "elements", "start", "base_hash", "tuned_hash")
_OF_SIDES = ("tuned_dtype", "resized")  # from version 2 on: how both sides of a tensor differ
_PLACE = re.compile(r"(?:sha256:[0-9a-f]{64}|git:[0-9a-f]{40}|git:[0-9a-f]{64})@(?:0|[1-9][0-9]*)")
_LONGEST_PLACE = 128
_HEX = b"0123456789abcdef"
_BUCKETS = 65  # of a histogram of ULP distances


def read_table(raw: bytes, manifest: dict[str, Any]) -> MaskTable:
    """The table of a store whose manifest was checked; raises ValueError."""
    newer = _OF_SIDES if manifest["format_version"] > 1 else ()
    data = object_of("it", _parse(raw), (*_COLUMNS, "changed", "statistics", *newer))
    tensors, rules, derived = manifest["tensors"], manifest["rules"], "made_by" in manifest
    for key in _COLUMNS:
        _column(key, data[key], tensors, list if key == "shape" else _TYPES.get(key, str))
    names, dtypes = data["name"], data["dtype"]
    if not ascending(names):
        raise ValueError("names are not in natural order, or one is there twice")
    if not set(dtypes) <= DTYPES.keys():
        raise ValueError(f"there is no dtype {shown(min(set(dtypes) - DTYPES.keys()))}")
    shapes = _shapes(data["shape"], data["elements"])
    if sum(data["elements"]) != manifest["elements"]:
        raise ValueError("the elements of all tensors are not as many as the manifest says")
    layout = Layout(np.array(data["elements"], np.int64))
    if layout.total != manifest["layout"]["addresses"] or layout.starts.tolist() != data["start"]:
        raise ValueError("start is not what the layout says")
    changed = _changed(data["changed"], rules, layout.elements, manifest["changed"])
    tuned_dtypes = resized = None
    if newer:
        tuned_dtypes = _tuned_dtypes(data["tuned_dtype"], dtypes, derived=derived)
        resized = _resized(data["resized"], shapes, derived=derived)
        if tuned_dtypes is None and not resized and not needs_newer(manifest):
            raise ValueError("it says no more than format 1 can, in a newer one")
    sides = _hashes(data, shapes, resized or {}, derived=derived)
    retyped = np.zeros(tensors, bool)
    if tuned_dtypes is not None:
        retyped[:] = list(map(ne, dtypes, tuned_dtypes))
    _check_hashes(*sides, changed, retyped, derived=derived)
    statistics = data["statistics"]
    if statistics is not None:
        if derived:
            raise ValueError("a derived store has statistics")
        statistics = _statistics(statistics, layout.elements, dtypes)
    columns = names, dtypes, shapes, layout.elements, layout.starts, changed
    hashes = data["base_hash"], data["tuned_hash"]
    return MaskTable(*columns, *hashes, statistics, tuned_dtypes, resized or {})


_TYPES: dict[str, type] = {"elements": int, "start": int}


def fits(raw: bytes) -> bool:
    """Whether a table is small enough to be read again."""
    lists = raw.count(b"[") + raw.count(b"{")
    light = len(raw) <= _LIGHT or weight(raw) <= _HEAVIEST
    return len(raw) <= LARGEST_TABLE and lists <= _MOST_LISTS and light


def _parse(raw: bytes) -> Any:
    """JSON as it must be: one value for a key, no NaN, and no more of it than fits into memory."""
    if not fits(raw):
        raise ValueError("it has far more values than a table")
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _column(what: str, values: Any, tensors: int, kind: type) -> None:
    """A column with a value of just that type for each tensor: True is no int here."""
    if type(values) is not list or len(values) != tensors:
        raise ValueError(f"{what} is not a column of {tensors:,} values")
    if not set(map(type, values)) <= {kind}:
        raise ValueError(f"{what} has a value of another type than {kind.__name__}")


def _integers(what: str, values: Any, most: IntArray) -> IntArray:
    """A column of whole numbers from 0 to those of ``most``."""
    _column(what, values, len(most), int)
    if values and not 0 <= min(values) <= max(values) <= MOST_ELEMENTS:
        raise ValueError(f"{what} has a number that cannot be")
    found = np.array(values, np.int64)
    if (found > most).any():
        raise ValueError(f"{what} counts more elements than a tensor has")
    return found


def _shapes(shapes: list[list[Any]], elements: list[int]) -> list[tuple[int, ...]]:
    """The shapes as tuples, once they are known to have those numbers of elements."""
    if not set(map(type, chain.from_iterable(shapes))) <= {int}:
        raise ValueError("a shape has something else than whole numbers")
    # a model has few different ones, and each is kept once
    known = dict[tuple[int, ...], tuple[int, ...]]()
    found = [known.setdefault(shape, shape) for shape in map(tuple, shapes)]
    sizes = dict.fromkeys(known, 0)
    for shape in sizes:
        if len(shape) > MOST_DIMENSIONS or min(shape, default=0) < 0:
            raise ValueError("there is a shape that cannot be")
        # a dimension of 0 does not excuse the others, as in a checkpoint's header
        if math.prod(max(n, 1) for n in shape) >= 1 << 63:
            raise ValueError("there is a shape that cannot be")
        sizes[shape] = math.prod(shape)
    if max(sizes.values(), default=0) > MOST_ELEMENTS:
        raise ValueError("a tensor has more elements than can be")
    if list(map(sizes.__getitem__, found)) != elements:
        raise ValueError("elements is not what the shapes say")
    return found


def _tuned_dtypes(values: Any, dtypes: list[str], *, derived: bool) -> list[str] | None:
    """The dtypes of the tuned side; None where all are the base's, which is how that is said."""
    if values is None:
        return None
    if derived:
        raise ValueError("a derived store has dtypes of a tuned side")
    _column("tuned_dtype", values, len(dtypes), str)
    pairs = {(one, other) for one, other in zip(dtypes, values, strict=True) if one != other}
    if not pairs:
        raise ValueError("tuned_dtype repeats dtype")
    if strange := [other for one, other in pairs if common(one, other) is None]:
        raise ValueError(f"tuned_dtype has {shown(min(strange))} where values cannot be compared")
    found: list[str] = values
    return found


def _resized(
    values: Any, shapes: list[tuple[int, ...]], *, derived: bool
) -> dict[int, tuple[int, int]]:
    """The rows of both sides where one has more than were compared, by position.

    Of a diff the other side has just those. What a derived store has are the most of its inputs.
    """
    if type(values) is not list or not all(type(item) is list for item in values):
        raise ValueError("resized is not a list of lists")
    if not {len(item) for item in values} <= {3}:
        raise ValueError("resized has something else than a position and two numbers of rows")
    if not set(map(type, chain.from_iterable(values))) <= {int}:
        raise ValueError("resized has something else than whole numbers")
    positions = [item[0] for item in values]
    if not all(map(lt, [-1, *positions], [*positions, len(shapes)])):
        raise ValueError("resized names a tensor that is not there, or not in order")
    for i, *rows in values:
        compared, *rest = shapes[i] or (-1,)
        most, least = max(rows), min(rows)
        if compared < 0 or not compared <= least <= most or compared == most:
            raise ValueError("resized has rows of which those that were compared are no part")
        if least > compared and not derived:
            raise ValueError("resized has rows that were not compared and that both sides have")
        if most * math.prod(max(n, 1) for n in rest) > MOST_ELEMENTS:
            raise ValueError("a tensor has more elements than can be")
    return {i: (base, tuned) for i, base, tuned in values}


def _hashes(
    data: dict[str, Any],
    shapes: list[tuple[int, ...]],
    resized: dict[int, tuple[int, int]],
    *,
    derived: bool,
) -> tuple[list[str], list[str]]:
    """The hashes of both sides without the marks of those that cover some rows only.

    The marks are there where they must be, else ValueError: those left elsewhere are no hashes.
    """
    found = list(data["base_hash"]), list(data["tuned_hash"])
    for i, rows in resized.items():
        for side, texts in enumerate(found):
            mark = "" if rows[side] == shapes[i][0] else f"/{shapes[i][0]}"
            if derived and texts[i] == UNKNOWN:
                continue
            if len(texts[i]) != 32 + len(mark) or not texts[i].endswith(mark):
                raise ValueError("a content hash does not cover the rows that were compared")
            texts[i] = texts[i][:32]
    return found


def _changed(
    columns: Any, rules: list[str], elements: IntArray, totals: dict[str, int]
) -> dict[str, IntArray]:
    if type(columns) is not dict or list(columns) != rules:
        raise ValueError("changed does not have the rules of the manifest")
    found = {rule: _integers(f"changed of {rule}", columns[rule], elements) for rule in rules}
    for rule, counts in found.items():
        if int(counts.sum()) != totals[rule]:
            raise ValueError(f"changed of {rule} does not add up to what the manifest says")
        # no rule finds equal bits changed
        if "exact" in found and (counts > found["exact"]).any():
            raise ValueError(f"changed of {rule} is more than differs in its bits")
    return found


def _check_hashes(
    base: list[str],
    tuned: list[str],
    changed: dict[str, IntArray],
    retyped: npt.NDArray[np.bool_],
    *,
    derived: bool,
) -> None:
    whole = True  # whether all are content hashes
    for texts in (base, tuned):
        known = texts
        if not set(map(len, texts)) <= {32}:
            whole = False
            known = [text for text in texts if len(text) == 32]
            _check_places({text for text in texts if len(text) != 32})
        if "".join(known).encode().translate(None, _HEX):
            raise ValueError("a content hash is none")
    if derived:
        if any(tuned):
            raise ValueError("a derived store has content hashes of a tuned side")
        return
    same = np.fromiter(map(eq, base, tuned), bool, len(base))
    # the same values of two dtypes have other bits
    if "exact" in changed and (~same & ~retyped & (changed["exact"] == 0)).any():
        raise ValueError("a tensor without a changed element has two content hashes")
    if whole:
        return
    unread = np.array([len(a) != 32 or len(b) != 32 for a, b in zip(base, tuned, strict=True)])
    if (unread & (~same | retyped)).any() or any(
        (counts[unread] != 0).any() for counts in changed.values()
    ):
        raise ValueError("a tensor that was not read for being equal has changed elements")


def _check_places(texts: set[str]) -> None:
    """What tensors are known by that were not read: a file's hash and a byte, or nothing."""
    for text in texts - {UNKNOWN}:
        if len(text) > _LONGEST_PLACE or not _PLACE.fullmatch(text):
            raise ValueError(f"a content hash cannot be {shown(text)}")


def _statistics(data: Any, elements: IntArray, dtypes: list[str]) -> Statistics:
    floats, ints = Statistics.FLOATS, Statistics.INTS
    object_of("statistics", data, (*floats, *ints, "ulp_histogram", "defined"))
    columns: dict[str, Any] = {}
    for key in floats:
        values = data[key]
        known = [x for x in values if x is not None] if type(values) is list else values
        if type(known) is not list or not set(map(type, known)) <= {float}:
            raise ValueError(f"{key} of statistics is not a column of numbers")
        if len(values) != len(elements) or not np.isfinite(np.array(known, np.float64)).all():
            raise ValueError(f"{key} of statistics is not a column of {len(elements):,} numbers")
        column = np.array([np.inf if x is None else x for x in values], np.float64)
        if key != "dot" and (column < 0).any():
            raise ValueError(f"{key} of statistics is negative")
        columns[key] = column
    for key in ints:
        columns[key] = _integers(f"{key} of statistics", data[key], elements)
    histograms = data["ulp_histogram"]
    _column("ulp_histogram", histograms, len(elements), list)
    for counts in histograms:
        if len(counts) > _BUCKETS or not set(map(type, counts)) <= {int}:
            raise ValueError("an ulp_histogram is not a list of counts")
        if min(counts, default=0) < 0 or counts[-1:] == [0]:
            raise ValueError("an ulp_histogram has a count that cannot be")
    sums = list(map(sum, histograms))
    if any(found > most for found, most in zip(sums, elements.tolist(), strict=True)):
        raise ValueError("an ulp_histogram counts more elements than a tensor has")
    _column("defined of statistics", data["defined"], len(elements), bool)
    numeric = {dtype: DTYPES[dtype].numeric for dtype in set(dtypes)}
    if data["defined"] != [numeric[dtype] for dtype in dtypes]:
        raise ValueError("defined of statistics is not what the dtypes say")
    defined = np.array(data["defined"], bool)
    return Statistics(**columns, ulp_histogram=histograms, defined=defined)

"""The manifest of a delta: every value of it is checked here, once, for whoever reads it later.

Its digest says nothing about who wrote it, so each value has a type, a range and a length before
anybody believes it. Version 1 has exactly these keys, version 2 also ``ranges``: a
later one will have another number.
Everything here raises ValueError with a phrase, which the container puts into its own error.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from ckdiff.checkpoints.formats.safetensors import HEADER_LIMIT, MAX_DIMS
from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.deltas.filenames import names_fault
from ckdiff.deltas.parts import FRAMES, HEADS, TENSORS, called
from ckdiff.deltas.registry import ENCODINGS
from ckdiff.dtypes import DTYPES
from ckdiff.errors import RuleError
from ckdiff.rules import Rule

MANIFEST_LIMIT = HEADER_LIMIT  #: bytes of the longest manifest that is read
_MAX = 2**63 - 1
_LONGEST_PATH, _LONGEST_RULE = 4096, 64
_DIGEST = re.compile(r"[0-9a-f]{32}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}")
_KEYS = {
    "encoding", "ckdiff", "elements", "changed", "files", "directory", "index", "parts", "base",
    "unpaired", "lossy",
}  # fmt: skip
_RANGE = {"name", "base", "base_shape", "first", "elements", "new"}
#: which sides an unpaired tensor is on
_SIDES = {
    "added": ("tuned",),
    "removed": ("base",),
    "reshaped": ("base", "tuned"),
    "retyped": ("base", "tuned"),
}


def read_manifest(raw: bytes, *, ranges: bool = False) -> dict[str, Any]:
    """The manifest in ``raw``, checked; it has ``ranges`` or not. What the tables say of the same
    is checked elsewhere.
    """
    keys = _KEYS | {"ranges"} if ranges else _KEYS
    try:
        # file names that are no text are surrogates that stand for their bytes
        facts = _object(_DECODER.decode(raw.decode("utf-8", "surrogatepass")), "it", keys)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(facts["encoding"], str) or facts["encoding"] not in ENCODINGS:
        raise ValueError("an unknown encoding")
    if not _matches(_VERSION, facts["ckdiff"]):
        raise ValueError("its ckdiff is not a version")
    elements, changed = (_number(facts[key], key) for key in ("elements", "changed"))
    if changed > elements:
        raise ValueError("more elements changed than there are")
    _check_files(facts)
    _check_parts(facts["parts"])
    _check_base(facts["base"])
    _check_unpaired(facts["unpaired"])
    _check_lossy(facts["lossy"], elements - changed)
    if ranges:
        _check_ranges(facts["ranges"])
    return facts


def _check_files(facts: dict[str, Any]) -> None:
    if type(facts["directory"]) is not bool:
        raise ValueError("directory is neither true nor false")
    files, total = _list(facts["files"], "files"), 0
    for item in files:
        name, size, head = _items(item, "a file", 3)
        _text(name, "a file's name", _LONGEST_PATH)
        total += _number(size, "a file's size")
        if not 10 <= _number(head, "a header's size") <= min(size, 8 + HEADER_LIMIT):
            raise ValueError("a header is larger than its file, or than any")
    if not files or total > _MAX:
        raise ValueError("files that no checkpoint has")
    if facts["index"] is not None:
        _text(facts["index"], "the index", _LONGEST_PATH)
    fault = names_fault([item[0] for item in files], facts["index"], directory=facts["directory"])
    if fault is not None:
        raise ValueError(fault)


def _check_parts(parts: Any) -> None:
    for name, item in _object(parts, "parts", {TENSORS, HEADS, FRAMES}).items():
        size, expected = _items(item, name, 2)
        _number(size, f"the size of {name}")
        if not _matches(_DIGEST, expected):
            raise ValueError(f"the digest of {name} is none")


def _check_base(base: Any) -> None:
    for item in _list(_object(base, "base", {"files"})["files"], "the base's files"):
        name, size = _items(item, "a file of the base", 2)
        _text(name, "the name of a file of the base", _LONGEST_PATH)
        _number(size, "the size of a file of the base")


def _check_unpaired(unpaired: Any) -> None:
    known = set[str]()
    for item in _list(unpaired, "unpaired"):
        reason = item.get("reason") if isinstance(item, dict) else None
        if not isinstance(reason, str) or reason not in _SIDES:
            raise ValueError("an unpaired tensor without a known reason")
        sides = _SIDES[reason]
        keys = {f"{side}_{what}" for side in sides for what in ("dtype", "shape")}
        _object(item, "an unpaired tensor", {"name", "reason"} | keys)
        name = _text(item["name"], "an unpaired tensor's name", HEADER_LIMIT, surrogates=False)
        if name in known:
            raise ValueError(f"{called(name)} is unpaired twice")
        known.add(name)
        for side in sides:
            _check_dtype(item[f"{side}_dtype"])
            _check_shape(item[f"{side}_shape"])
        if len(sides) == 2:
            same = item["base_shape"] == item["tuned_shape"]
            if same != (reason == "retyped") or (
                same and item["base_dtype"] == item["tuned_dtype"]
            ):
                raise ValueError(f"{called(name)} is not {reason}")


def _check_ranges(ranges: Any) -> None:
    for item in _list(ranges, "ranges"):
        _object(item, "a range", _RANGE)
        for key in ("name", "base"):
            _text(item[key], "a range's name", HEADER_LIMIT, surrogates=False)
        _check_shape(item["base_shape"])
        for key in ("first", "elements", "new"):
            _number(item[key], f"a range's {key}")


def _check_lossy(lossy: Any, most: int) -> None:
    if lossy is None:
        return
    _object(lossy, "lossy", {"mask", "rule", "left_out"})
    if not _matches(_DIGEST, lossy["mask"]):
        raise ValueError("the mask's digest is none")
    rule = _text(lossy["rule"], "the mask's rule", _LONGEST_RULE)
    try:
        canonical = str(Rule.parse(rule))
    except RuleError:
        canonical = ""
    if canonical != rule:
        raise ValueError("the mask's rule is none")
    if _number(lossy["left_out"], "left_out") > most:
        raise ValueError("more is left out than there is")


# values


def _object(value: Any, what: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object")
    if value.keys() != keys:
        other = sorted(value.keys() ^ keys)[0]
        verb = "has no" if other in keys else "has an unknown"
        raise ValueError(f"{what} {verb} {shown(other, 40)}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list")
    return value


def _items(value: Any, what: str, count: int) -> list[Any]:
    if len(_list(value, what)) != count:
        raise ValueError(f"{what} does not have {count} items")
    return list(value)


def _number(value: Any, what: str) -> int:
    """A whole number; the decoder takes none that are negative or larger than an int64."""
    if type(value) is not int:
        raise ValueError(f"{what} is not a whole number")
    return value


def _text(value: Any, what: str, most: int, *, surrogates: bool = True) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"{what} is not a text, or is too long")
    try:
        value.encode("utf-8", "surrogateescape" if surrogates else "strict")
    except UnicodeEncodeError:
        raise ValueError(f"{what} has half of a surrogate pair") from None
    return value


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _check_dtype(value: Any) -> None:
    if not isinstance(value, str) or value not in DTYPES:
        raise ValueError("an unknown dtype")


def _check_shape(value: Any) -> None:
    if len(_list(value, "a shape")) > MAX_DIMS:
        raise ValueError("a shape has too many dimensions")
    for dim in value:
        _number(dim, "a dimension")


# JSON


def _natural(text: str) -> int:
    if len(text) > 19 or not text.isdecimal() or int(text) > _MAX:
        _no_number(text)
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{shown(text, 30)} is not a whole number from 0 to 2**63-1")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=_natural,
    parse_float=_no_number,
    parse_constant=_no_number,
)

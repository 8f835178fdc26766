"""The little JSON that decides what a checkpoint is, read straight from bytes.

``json.loads`` takes NaN, duplicate keys and lone surrogates without a word, and builds objects many
times the size of the text. The two files that matter here (a safetensors header and a shard index)
are in essence long flat objects, so they are walked one member at a time with regular expressions
over the bytes; ``json`` is only asked about short strings with escapes and about short leftovers.

Every function raises ValueError with a phrase that the caller puts into its own error.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

#: what JSON calls whitespace; possessive, so that hostile runs of it cost one pass
WS = rb"[ \t\n\r]*+"
#: a string token; the group holds what is between the quotes, escapes still in place
STRING = rb'"([^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+)"'
#: bytes of a value that :func:`any_value` looks at
VALUE_LIMIT = 1 << 20

_KEY = re.compile(WS + STRING + WS + rb":" + WS, re.DOTALL)
_PAIR = re.compile(WS + STRING + WS + rb":" + WS + STRING + WS + rb"([,}])", re.DOTALL)
_BLANK = re.compile(WS)
#: pairs of a map of strings: ten times what the largest models have; each costs 140 bytes and more
PAIR_LIMIT = 1 << 20
_LONGEST_NUMBER = 40
_WINDOWS = (1 << 10, 1 << 15, VALUE_LIMIT)


def shown(text: str, limit: int = 120) -> str:
    """``text`` quoted for a message: control characters escaped, cut after ``limit``."""
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."


def text_of(token: bytes) -> str:
    """The string between two quotes, escapes resolved."""
    try:
        text: str = token.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"a string that is not UTF-8 ({error.reason})") from None
    if "\\" not in text:
        return text
    try:
        resolved: str = json.loads(f'"{text}"')
        resolved.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a string with half of a surrogate pair") from None
    except ValueError:
        raise ValueError(f"a string with an unknown escape: {shown(text)}") from None
    return resolved


def skip_blank(raw: bytes, pos: int) -> int:
    """The position of the first byte from ``pos`` on that is not whitespace."""
    match = _BLANK.match(raw, pos)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def key_at(raw: bytes, pos: int) -> tuple[str, int]:
    """The key that starts at ``pos`` and the position of its value."""
    match = _KEY.match(raw, pos)
    if match is None:
        raise ValueError(f"a quoted key and ':' expected at byte {skip_blank(raw, pos)}")
    return text_of(match[1]), match.end()


def string_map(raw: bytes, pos: int) -> tuple[dict[str, str], int]:
    """The object of strings that starts at ``pos``, and the position after it.

    Equal short values share one string, so that a map of 100,000 tensors to a few shards is mostly
    its keys.
    """
    if raw[pos : pos + 1] != b"{":
        raise ValueError("not an object of strings")
    result: dict[str, str] = {}
    pos = skip_blank(raw, pos + 1)
    if raw[pos : pos + 1] == b"}":
        return result, pos + 1
    values: dict[bytes, str] = {}
    match_pair = _PAIR.match
    while True:
        match = match_pair(raw, pos)
        if match is None:
            key, start = key_at(raw, pos)
            if raw[start : start + 1] == b'"':
                raise ValueError(f"the value of {shown(key)} is cut or badly quoted")
            raise ValueError(f"the value of {shown(key)} is not a string")
        key_token, token, mark = match.groups()
        key = text_of(key_token)
        if key in result:
            raise ValueError(f"duplicate key {shown(key)}")
        if len(result) == PAIR_LIMIT:
            raise ValueError(f"more than {PAIR_LIMIT:,} strings")
        value = values.get(token)
        if value is None:
            value = text_of(token)
            if len(token) < 512:
                values[token] = value
        result[key] = value
        pos = match.end()
        if mark == b"}":
            return result, pos


def any_value(raw: bytes, pos: int, *, whole_numbers: bool) -> tuple[Any, int]:
    """Any JSON value of at most ``VALUE_LIMIT`` bytes at ``pos``, and the position after it.

    Duplicate keys, NaN and infinities, absurdly long numbers, bad UTF-8 and deep nesting are
    refused. With ``whole_numbers`` a plain 0, 1, 2, ... below 2**63 is an int, and every other
    number a float, however long.
    """
    # nearly all values are short: to look at all that is allowed for each would be quadratic
    for limit in _WINDOWS:
        found = _value_in(raw[pos : pos + limit], pos, limit, whole_numbers)
        if found is not None:
            return found[0], pos + found[1]
    raise ValueError(f"a value longer than {VALUE_LIMIT} bytes, or not JSON")


def sound(value: Any, levels: int) -> None:
    """Raise ValueError where a decoded value is nested deeper than ``levels``, or has a string with
    half of a surrogate pair: ``json`` takes both, and others do not.
    """
    below = [value]
    while below:
        levels -= 1
        here, below = below, []
        for item in here:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, (list, tuple)):
                below += item
            else:
                continue
            if levels < 0 and not isinstance(item, str):
                raise ValueError("JSON nested too deeply")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a string with half of a surrogate pair") from None


def _value_in(window: bytes, pos: int, limit: int, whole: bool) -> tuple[Any, int] | None:
    """The value that a window of the text begins with, and its bytes; None where it is cut off."""
    cut = len(window) == limit
    plain = window.isascii()
    decoder = _WHOLE if whole else _LOOSE
    try:
        # Latin-1 keeps byte and character positions equal; the real decoding follows.
        value, used = decoder.raw_decode(window.decode("latin-1"))
        if cut and limit < VALUE_LIMIT and used > limit - _LONGEST_NUMBER:
            return None  # a number may go on
        if not plain:
            value, _ = decoder.raw_decode(window[:used].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        if cut:
            return None
        raise ValueError(f"not JSON ({error.msg} at byte {pos + error.pos})") from None
    return value, used


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {shown(key)}")
            seen.add(key)
    return result


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{shown(text, 30)} is not a number")


def _natural(text: str) -> int | float:
    # the decoder has refused what is no number of JSON, such as 01
    if text[0] == "-" or len(text) > 19 or (number := int(text)) >= 2**63:
        return _finite(text)
    return number


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"a number out of range: {shown(text, 30)}")
    return number


def _integer(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


_WHOLE = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=_natural,
    parse_float=_finite,
    parse_constant=_refuse_number,
)
_LOOSE = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_constant=_refuse_number
)

"""Records as data frames of pandas or polars, neither of which ckdiff needs for anything else.

A record is a dict with plain values, the ones that ``--json`` prints; None is what JSON calls null.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ckdiff.errors import UsageError, install, printable

Record = dict[str, Any]


class Framed:
    """A result whose numbers can be had as records, and as data frames."""

    __slots__ = ()

    def records(self) -> list[Record]:
        """The rows, with the numbers that ``to_dict()`` has, each with the same keys."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """``records()`` as a pandas DataFrame. Raises UsageError where pandas is missing."""
        return pandas_frame(self.records(), self._columns())

    def to_polars(self) -> Any:
        """``records()`` as a polars DataFrame. Raises UsageError where polars is missing."""
        return polars_frame(self.records(), self._columns())

    def _columns(self) -> Sequence[str]:
        """The columns of a frame without rows."""
        return ()


def pandas_frame(records: Sequence[Record], names: Sequence[str] = ()) -> Any:
    """A pandas DataFrame: missing numbers are NaN, among whole numbers ``<NA>``.

    ``names`` are the columns where there are no records. Raises UsageError without pandas.
    """
    pandas = _library("pandas")
    made = {}
    for name, values in columns(records, names).items():
        gaps = None in values
        whole = any(isinstance(value, int) for value in values)
        if gaps and whole and not any(isinstance(value, float) for value in values):
            made[name] = pandas.Series(values, dtype="Int64")
        elif any(isinstance(value, float) for value in values):
            made[name] = pandas.Series(values, dtype="float64")
        else:
            made[name] = pandas.Series(values, dtype=None if values else "object")
    return pandas.DataFrame(made)


def polars_frame(records: Sequence[Record], names: Sequence[str] = ()) -> Any:
    """A polars DataFrame: what is missing is null, and lists are lists.

    ``names`` are the columns where there are no records. Raises UsageError without polars.
    """
    polars = _library("polars")
    made = {}
    for name, values in columns(records, names).items():
        if any(isinstance(value, float) for value in values):
            values = [None if value is None else float(value) for value in values]
        made[name] = polars.Series(name, values)
    return polars.DataFrame(made)


def columns(records: Sequence[Record], names: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The values of each column, None where a record has none; texts are such that any library
    takes them: what is no Unicode is escaped.
    """
    known = dict.fromkeys(names)
    for record in records:
        known |= dict.fromkeys(record)
    return {name: [_plain(record.get(name)) for record in records] for name in known}


def _plain(value: Any) -> Any:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # such as a file's name that is not UTF-8
            return printable(value)
    return value


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(
            f"data frames of {name} need the package {name}",
            hint=f"{install(name)}, or {install('notebook')}",
        ) from None

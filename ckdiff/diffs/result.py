"""What a diff found."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckdiff._version import __version__
from ckdiff.checkpoints.opening import Given
from ckdiff.checkpoints.pairing import REASONS, Unpaired
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.figures.numbers import counted
from ckdiff.stores.shown import TableShown, not_whole, table_html
from ckdiff.stores.table import MaskTable

if TYPE_CHECKING:
    from ckdiff.diffs.comparison import Comparison
    from ckdiff.stores.maskstore import MaskStore


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a gate says of a diff."""

    gate: str  #: the option without its dashes, or ``unpaired``
    threshold: float  #: the value that is still allowed
    value: float  #: what was found: a density, or how many elements or tensors are against it
    ok: bool
    reason: str  #: one line
    glob: str | None = None  #: of ``--expect-changed`` and ``--expect-unchanged``
    tensors: tuple[str, ...] = ()  #: those it fails for

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        out = {name: getattr(self, name) for name in ("gate", "threshold", "value", "ok", "reason")}
        return out if self.glob is None else out | {"glob": self.glob, "tensors": [*self.tensors]}


@dataclass(slots=True, repr=False)
class DiffResult(TableShown):
    """What a diff found. ``to_dict()`` is what ``ckdiff diff --json`` prints."""

    table: MaskTable  #: the compared tensors
    rules: dict[str, dict[str, Any]]  #: rule -> ``changed`` and ``density`` over the model
    unpaired: dict[str, list[str]]  #: reason -> names
    unpaired_details: list[dict[str, Any]]
    excluded: int
    exact_only: dict[str, list[str]]  #: rule -> tensors on which it means ``exact``
    bytes_read: int  #: both sides, resumed bytes included
    bytes_resumed: int  #: of those, what an earlier run that was stopped had read
    bytes_known_equal: int  #: both sides: not read, because they are known to be equal
    seconds: float  #: from opened sources to committed store
    device: str  #: where windows were compared: ``cpu`` or ``cuda``
    device_why: str | None  #: why there; None where nobody asked for another device
    #: of the sides that are on the hub, ``base`` and ``tuned``: the commit that was compared
    commits: dict[str, str] = field(default_factory=dict)
    base: str = ""  #: as it was asked for; on the hub with the commit that was compared
    tuned: str = ""
    #: tensors of two dtypes that were compared by value: ``name``, ``base`` and ``tuned`` (dtypes)
    retyped: list[dict[str, Any]] = field(default_factory=list)
    #: tensors of which the rows were compared that both sides have: ``name``, ``base`` and
    #: ``tuned`` (shapes), ``rows``
    resized: list[dict[str, Any]] = field(default_factory=list)
    #: unpaired tensors with the bits of another of their side: ``name``, ``same_as``, ``side``
    tied: list[dict[str, Any]] = field(default_factory=list)
    #: of a base with an adapter: what became of the adapter's changes in the tuned side
    merge: dict[str, Any] | None = None
    #: globs that match no tensor, as they were asked for: ``--include 'x*'``
    unmatched: list[str] = field(default_factory=list)
    gates: list[Verdict] = field(default_factory=list)  #: what :mod:`ckdiff.diffs.gates` said
    store_path: Path | None = None  #: where the masks are, or None where nothing was stored
    _store: MaskStore | None = None

    @property
    def store(self) -> MaskStore | None:
        """The MaskStore that was written, opened when first used; None without an output."""
        if self._store is None and self.store_path is not None:
            from ckdiff.stores.maskstore import open_store

            self._store = open_store(self.store_path)
        return self._store

    def __repr__(self) -> str:
        found = ", ".join(f"{rule} {counts['density']:.4g}" for rule, counts in self.rules.items())
        return f"<DiffResult: {len(self.table):,} tensors, densities: {found}>"

    def _repr_html_(self) -> str:
        words = not_whole(self.table, len(self.unpaired_details))
        if self.excluded:
            words.append(f"{counted(self.excluded, 'tensor')} excluded, as requested.")
        words += [f"Matches no tensor: {glob}." for glob in self.unmatched]
        words += [f"Failed: {verdict.reason}." for verdict in self.gates if not verdict.ok]
        if self.store_path is not None:
            words.append(f"Masks are in {self.store_path.name}.")
        return table_html(self.table, f"{self.tuned} against {self.base}", words)

    def _to_show(self) -> tuple[MaskTable, str]:
        where = self.store_path if self.store_path is not None else Path(self.tuned)
        return self.table, where.name.removesuffix(".zarr") or self.tuned

    @property
    def elements(self) -> int:
        """Elements compared."""
        return self.table.total_elements

    @property
    def differs(self) -> bool:
        """Whether any element or tensor differs."""
        unlike = any(self.unpaired.values()) or self.retyped or self.resized
        return bool(self.rules["exact"]["changed"] or unlike)

    @property
    def tensors_identical(self) -> int:
        """How many of the compared tensors are bit-identical, with the same number of rows."""
        same = self.table.changed["exact"] == 0
        if self.resized:
            grown = {item["name"] for item in self.resized}
            same &= [name not in grown for name in self.table.names]
        return int(same.sum())

    @property
    def uncompared(self) -> dict[str, int]:
        """How many ``tensors`` were not compared, and how many ``elements`` they have on the larger
        side.
        """
        elements = sum(map(_elements, self.unpaired_details))
        return {"tensors": len(self.unpaired_details), "elements": elements}

    @property
    def ok(self) -> bool:
        """Whether no gate failed."""
        return all(verdict.ok for verdict in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """The JSON contract of ``diff``."""
        out: dict[str, Any] = {
            "version": __version__,
            "base": self.base,
            "tuned": self.tuned,
            "elements": self.elements,
            "tensors": len(self.table),
            "tensors_identical": self.tensors_identical,
            "rules": self.rules,
            "unpaired": self.unpaired,
            "unpaired_details": self.unpaired_details,
            "uncompared": self.uncompared,
            "retyped": self.retyped,
            "resized": self.resized,
            "tied": self.tied,
            "gates": [verdict.to_dict() for verdict in self.gates],
            "ok": self.ok,
            "excluded": self.excluded,
            "exact_only": self.exact_only,
            "bytes_read": self.bytes_read,
            "bytes_resumed": self.bytes_resumed,
            "bytes_known_equal": self.bytes_known_equal,
            "seconds": self.seconds,
            "device": self.device,
            "device_why": self.device_why,
            "store": None if self.store_path is None else str(self.store_path),
        }
        if self.merge is not None:
            out["merge"] = self.merge
        if self.commits:
            out["commits"] = self.commits
        if self.table.statistics is not None:
            from ckdiff.stores.summaries import summarise

            out["statistics"] = [
                {"name": row["name"], **row.get("statistics", {})}
                for row in summarise(self.table, "tensor")
            ]
        return out


def commits(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """Of the sides that are on the hub the commit, 40 hex digits."""
    origins = {side: c.origin for side, c in (("base", base), ("tuned", tuned))}
    return {side: origin["commit"] for side, origin in origins.items() if "commit" in origin}


def asked_for(given: Given, side: Checkpoint) -> str:
    """What was asked for, in words; of the hub the address of the commit that was compared."""
    origin = side.origin
    if "commit" in origin:
        from ckdiff.checkpoints.places.hub.address import HubAddress

        return str(HubAddress(origin["repository"], origin["commit"], origin.get("path", "")))
    return os.fspath(given) if isinstance(given, (str, os.PathLike)) else side.label


def retyped(comparison: Comparison) -> list[dict[str, Any]]:
    """The tensors of two dtypes that are compared by value: ``name``, ``base``, ``tuned``."""
    names, (base, tuned) = comparison.pairing.names, comparison.sides
    return [
        {"name": names[i], "base": base.dtypes[i], "tuned": tuned.dtypes[i]}
        for i in sorted(comparison.pairing.retyped)
    ]


def resized(comparison: Comparison) -> list[dict[str, Any]]:
    """The tensors of which the rows of both sides are compared: ``name``, the shapes ``base`` and
    ``tuned``, and ``rows``, how many these are.
    """
    found = []
    for i, (base, tuned) in sorted(comparison.pairing.resized.items()):
        rows, *rest = comparison.shapes[i]
        shapes = {"base": [base, *rest], "tuned": [tuned, *rest]}
        found.append({"name": comparison.pairing.names[i], **shapes, "rows": rows})
    return found


def by_reason(unpaired: Sequence[Unpaired]) -> dict[str, list[str]]:
    """reason -> names."""
    out: dict[str, list[str]] = {reason: [] for reason in REASONS}
    for tensor in unpaired:
        out[tensor.reason].append(tensor.name)
    return out


def unpaired_names(listed: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """``by_reason`` of what ``details`` gave."""
    out: dict[str, list[str]] = {reason: [] for reason in REASONS}
    for item in listed:
        out.setdefault(str(item["reason"]), []).append(str(item["name"]))
    return out


def details(unpaired: Sequence[Unpaired]) -> list[dict[str, Any]]:
    """One JSON-able object for each tensor that is not compared."""
    return [{"name": t.name, "reason": t.reason, **_jsonable(t.detail)} for t in unpaired]


def _jsonable(detail: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in detail.items()}


def _elements(detail: Mapping[str, Any]) -> int:
    """Elements of an unpaired tensor on its larger side; 0 where nobody says its shape."""
    shapes = (detail.get(f"{side}_shape") for side in ("base", "tuned"))
    return max((math.prod(shape) for shape in shapes if shape is not None), default=0)

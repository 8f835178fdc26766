"""What a diff found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckdiff.checkpoints.pairing import Unpaired
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.stores.table import MaskTable

if TYPE_CHECKING:
    from ckdiff.stores.maskstore import MaskStore


@dataclass(slots=True, repr=False)
class DiffResult:
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
    store_path: Path | None = None  #: where the masks are, or None where nothing was stored
    _store: MaskStore | None = None

    @property
    def store(self) -> MaskStore | None:
        """The MaskStore that was written, opened when first asked for; None without an output."""
        if self._store is None and self.store_path is not None:
            from ckdiff.stores.maskstore import open_store

            self._store = open_store(self.store_path)
        return self._store

    def __repr__(self) -> str:
        found = ", ".join(f"{rule} {counts['density']:.4g}" for rule, counts in self.rules.items())
        return f"<DiffResult: {len(self.table):,} tensors, densities: {found}>"

    @property
    def elements(self) -> int:
        """Elements compared."""
        return self.table.total_elements

    @property
    def differs(self) -> bool:
        """Whether any element or tensor differs."""
        return bool(self.rules["exact"]["changed"]) or any(self.unpaired.values())

    def to_dict(self) -> dict[str, Any]:
        """The JSON contract of ``diff``."""
        out: dict[str, Any] = {
            "elements": self.elements,
            "tensors": len(self.table),
            "rules": self.rules,
            "unpaired": self.unpaired,
            "unpaired_details": self.unpaired_details,
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


def by_reason(unpaired: Sequence[Unpaired]) -> dict[str, list[str]]:
    """reason -> names."""
    out: dict[str, list[str]] = {"added": [], "removed": [], "reshaped": [], "retyped": []}
    for tensor in unpaired:
        out[tensor.reason].append(tensor.name)
    return out


def unpaired_names(listed: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """``by_reason`` of what ``details`` gave."""
    out: dict[str, list[str]] = {"added": [], "removed": [], "reshaped": [], "retyped": []}
    for item in listed:
        out.setdefault(str(item["reason"]), []).append(str(item["name"]))
    return out


def details(unpaired: Sequence[Unpaired]) -> list[dict[str, Any]]:
    """One JSON-able object for each tensor that is not compared."""
    return [{"name": t.name, "reason": t.reason, **_jsonable(t.detail)} for t in unpaired]


def _jsonable(detail: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in detail.items()}

"""The tensors of a result in columns, as records, and as the store's JSON table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ckdiff.errors import CkdiffError, printable
from ckdiff.rules import Rule

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

#: content hash of a side that a derived store does not have, or that its sources dispute
UNKNOWN = ""
_COMPARED = 256  # characters of a name that is looked for among others like it


def is_content_hash(text: str) -> bool:
    """Whether a recorded hash is one of the bytes themselves.

    That of a tensor which was not read says where its bytes are: ``sha256:HEX@OFFSET``. That of a
    tensor's first rows says how many they are: ``HEX/ROWS``.
    """
    return len(text) == 32 or text[32:33] == "/"


def hash_of_rows(digest: str, compared: int, rows: int) -> str:
    """How the content hash of the first ``compared`` rows of a tensor of ``rows`` is recorded."""
    return digest if compared == rows else f"{digest}/{compared}"


def content_of(text: str) -> str:
    """A recorded hash without the number of rows that it covers.

    Hashes of one tensor of two stores cover the same rows where their masks have one shape: those
    of the mask. So without their marks they tell whether the contents are the same.
    """
    return text.partition("/")[0]


class ByRule(dict[str, Any]):
    """A dict keyed by canonical rule text that any spelling of a rule finds."""

    def __missing__(self, key: object) -> Any:
        if isinstance(key, (str, Rule)):
            canonical = str(Rule.parse(key))
            if canonical != key and canonical in self:
                return self[canonical]
        raise KeyError(key)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One compared tensor."""

    name: str
    dtype: str  #: safetensors name
    shape: tuple[int, ...]
    elements: int
    changed: ByRule  #: rule -> changed elements
    start: int  #: element address in the flat mask
    base_hash: str  #: content hash of the base side, 32 hex digits
    tuned_hash: str
    statistics: dict[str, Any] | None = None  #: with ``--stats``
    tuned_dtype: str = ""  #: of the tuned side; in a store it is always there
    #: of base and tuned, where only the rows were compared that both have
    rows: tuple[int, int] | None = None

    def density(self, rule: str = "exact") -> float:
        """changed / elements; 0 for a tensor without elements."""
        return self.changed[rule] / self.elements if self.elements else 0.0


@dataclass(slots=True, eq=False)
class Statistics:
    """Per-tensor statistics in columns (float64 sums over elements finite on both sides)."""

    sum_abs_delta: FloatArray
    l2_delta: FloatArray
    max_abs_delta: FloatArray
    l2_base: FloatArray
    l2_tuned: FloatArray
    dot: FloatArray  #: sum of base * tuned
    sign_flips: IntArray
    nonfinite: IntArray  #: elements left out of the sums: an inf or NaN on either side
    #: changed elements by ULP distance: [0] distance 0, [k] 2**(k-1) <= distance < 2**k
    ulp_histogram: list[list[int]]
    defined: npt.NDArray[np.bool_]  #: False where the dtype has no numeric meaning

    def record(self, i: int) -> dict[str, Any] | None:
        """The statistics of tensor ``i``; None where its dtype has no numeric meaning."""
        if not self.defined[i]:
            return None
        dot = float(self.dot[i])
        norms = float(self.l2_base[i]) * float(self.l2_tuned[i])
        # squares of huge float64 numbers overflow: then there is no cosine, rather than a wrong one
        cosine = dot / norms if 0 < norms < np.inf and np.isfinite(dot) else None
        return {
            "sum_abs_delta": number(self.sum_abs_delta[i]),
            "l2_delta": number(self.l2_delta[i]),
            "max_abs_delta": number(self.max_abs_delta[i]),
            "l2_base": number(self.l2_base[i]),
            "l2_tuned": number(self.l2_tuned[i]),
            "cosine": None if cosine is None else number(max(-1.0, min(1.0, cosine))),
            "sign_flips": int(self.sign_flips[i]),
            "nonfinite": int(self.nonfinite[i]),
            "ulp_histogram": self.ulp_histogram[i],
        }

    FLOATS = ("sum_abs_delta", "l2_delta", "max_abs_delta", "l2_base", "l2_tuned", "dot")
    INTS = ("sign_flips", "nonfinite")

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {k: [number(x) for x in getattr(self, k)] for k in self.FLOATS}
        out.update({k: getattr(self, k).tolist() for k in self.INTS})
        return out | {"ulp_histogram": self.ulp_histogram, "defined": self.defined.tolist()}


def number(value: float | np.floating[Any]) -> float | None:
    """A JSON number, or None for what JSON has no word for."""
    value = float(value)
    return value if np.isfinite(value) else None


@dataclass(eq=False, repr=False)
class MaskTable(Sequence[TensorRecord]):
    """The compared tensors in layout order."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    elements: IntArray
    starts: IntArray
    changed: dict[str, IntArray]  #: canonical rule text -> changed elements of each tensor
    base_hashes: list[str]
    tuned_hashes: list[str]
    statistics: Statistics | None = None
    #: of the tuned side, where they are not all as ``dtypes``: then values were compared
    tuned_dtypes: list[str] | None = None
    #: position -> rows of the base's tensor and of the tuned one, where they have not as many: then
    #: ``shapes`` has the rows that were compared. Derived: the most that an input's sides have
    resized: dict[int, tuple[int, int]] = field(default_factory=dict)
    _position: dict[str, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.tuned_dtypes == self.dtypes:
            self.tuned_dtypes = None
        self._position.update(zip(self.names, range(len(self.names)), strict=True))

    def __repr__(self) -> str:
        return f"<MaskTable: {len(self):,} tensors, {self.total_elements:,} elements>"

    def __len__(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskTable) and self.to_json(2) == other.to_json(2)

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, index: int) -> TensorRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[TensorRecord]: ...
    def __getitem__(self, index: int | slice) -> TensorRecord | list[TensorRecord]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._record(index % len(self))

    def __iter__(self) -> Iterator[TensorRecord]:
        return map(self._record, range(len(self)))

    def _record(self, i: int) -> TensorRecord:
        return TensorRecord(
            self.names[i],
            self.dtypes[i],
            self.shapes[i],
            int(self.elements[i]),
            ByRule({rule: int(counts[i]) for rule, counts in self.changed.items()}),
            int(self.starts[i]),
            self.base_hashes[i],
            self.tuned_hashes[i],
            None if self.statistics is None else self.statistics.record(i),
            self.dtypes[i] if self.tuned_dtypes is None else self.tuned_dtypes[i],
            self.resized.get(i),
        )

    def find(self, name: str) -> int:
        """Position of the tensor called ``name``; raises CkdiffError with near names."""
        found = self._position.get(name)
        if found is None:
            import difflib

            # comparing takes the square of a name's length, and a store may have names of any
            names = [known for known in self.names[:20_000] if len(known) <= _COMPARED]
            near = difflib.get_close_matches(name[:_COMPARED], names, 3, 0.6)
            meant = ", ".join(map(printable, near))
            hint = f"did you mean {meant}?" if near else "see ckdiff show --by tensor"
            raise CkdiffError(f"no tensor called {name!r} in the store", hint=hint)
        return found

    @cached_property
    def total_elements(self) -> int:
        """Elements of all tensors."""
        return int(self.elements.sum())

    @property
    def unlike(self) -> bool:
        """Whether both sides of some tensor differ in dtype or rows."""
        return self.tuned_dtypes is not None or bool(self.resized)

    @property
    def kinds(self) -> list[str]:
        """What each tensor is stored as: ``BF16``, or ``BF16/F32`` where the sides differ."""
        if self.tuned_dtypes is None:
            return self.dtypes
        pairs = zip(self.dtypes, self.tuned_dtypes, strict=True)
        return [one if one == other else f"{one}/{other}" for one, other in pairs]

    def retyped_tensors(self) -> list[dict[str, Any]]:
        """Tensors of two dtypes: ``name``, ``base`` and ``tuned``, which are dtypes."""
        columns = zip(self.names, self.dtypes, self.tuned_dtypes or self.dtypes, strict=True)
        return [{"name": n, "base": a, "tuned": b} for n, a, b in columns if a != b]

    def resized_tensors(self) -> list[dict[str, Any]]:
        """Tensors of which some rows were compared: ``name``, ``base`` and ``tuned``, which are
        shapes, and ``rows``, how many were compared.
        """
        found = []
        for i, (base, tuned) in sorted(self.resized.items()):
            rows, *rest = self.shapes[i]
            sides = {"base": [base, *rest], "tuned": [tuned, *rest]}
            found.append({"name": self.names[i], **sides, "rows": rows})
        return found

    def to_json(self, version: int = 1) -> dict[str, Any]:
        """The content of ``tensors.json`` in a format's version."""
        said: dict[str, Any] = {
            "name": self.names,
            "dtype": self.dtypes,
            "shape": [list(shape) for shape in self.shapes],
            "elements": self.elements.tolist(),
            "start": self.starts.tolist(),
            "changed": {rule: counts.tolist() for rule, counts in self.changed.items()},
            "base_hash": self.base_hashes,
            "tuned_hash": self.tuned_hashes,
            "statistics": None if self.statistics is None else self.statistics.to_json(),
        }
        if version > 1:
            said["tuned_dtype"] = self.tuned_dtypes
            said["resized"] = [[i, *rows] for i, rows in sorted(self.resized.items())]
        return said

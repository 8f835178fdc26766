"""What an adapter does to each tensor of a base: found and checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.checkpoints.protocol import IntArray, TensorTable
from ckdiff.checkpoints.views.adaptermath import FLOATS
from ckdiff.checkpoints.views.adapternames import Factors, Names, Placing, may_be_new, read_names
from ckdiff.checkpoints.views.peft import LoraConfig
from ckdiff.checkpoints.views.peftpatterns import Steps
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError

_OTHER_BASE = "give the base model that the adapter was made for"


@dataclass(frozen=True, slots=True)
class Factor:
    """A matrix of an adapter, as the product needs it."""

    tensor: int  #: its position in the adapter; -1 for ones
    across: bool  #: whether it is stored the other way round
    width: int  #: elements of a row as it is stored


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of one tensor: ``scaling * left @ right``, the tensor being (rows, columns)."""

    left: Factor  #: (rows, rank)
    right: Factor  #: (rank, columns)
    rank: int
    rows: int
    columns: int
    scaling: float
    round_first: bool  #: see ``adaptermath.merged``


@dataclass(slots=True)
class MergePlan:
    """A base with an adapter merged into it: where each tensor comes from, and what is added."""

    table: TensorTable
    base_at: IntArray  #: for each tensor its position in the base, -1 where the adapter has it
    adapter_at: IntArray  #: for each tensor its position in the adapter, -1 where the base has it
    changes: dict[int, LowRank]  #: by tensor
    cast: dict[int, str]  #: tensors whose dtype is not that of the adapter's, and which that is

    def round_first(self) -> None:
        """Merge as ``merge_and_unload(safe_merge=True)`` does, which rounds the change of every
        weight before it is added: 2 to 9 % of the elements of a bfloat16 model differ by that.
        """
        for tensor, change in self.changes.items():
            if change.right.tensor >= 0:  # biases are rounded once either way
                self.changes[tensor] = replace(change, round_first=True)

    def computed(self, tensor: int) -> bool:
        """Whether the bytes of a tensor are in no file."""
        return tensor in self.changes or tensor in self.cast


def plan_merge(
    base: TensorTable, adapter: TensorTable, config: LoraConfig, labels: tuple[str, str]
) -> MergePlan:
    """Plan it; ``labels`` are how errors name the base and the adapter.

    Every tensor of the adapter is used once, or the error names it. Raises CheckpointError.
    """
    names = read_names(adapter.names, labels[1])
    return _Planning(base, adapter, config, names, labels).plan()


class _Planning:
    """One planning: the tables, and what is known so far."""

    def __init__(
        self,
        base: TensorTable,
        adapter: TensorTable,
        config: LoraConfig,
        names: Names,
        labels: tuple[str, str],
    ) -> None:
        self._adapter, self._config, self._names = adapter, config, names
        self._label, self._where = labels
        self._placing = Placing(base, self._label, names, self._where)
        self._table = TensorTable(
            list(base.names), list(base.dtypes), list(base.shapes), base.nbytes.copy(), base.absent
        )
        self._base = len(base)
        self._replaced: dict[int, int] = {}  # tensors that the adapter has, and where
        self._changes: dict[int, LowRank] = {}
        self._steps = Steps()

    def plan(self) -> MergePlan:
        for name, position in self._names.whole.items():
            self._replace(name, position)
        across = self._square_ones()
        for module, factors in self._names.linear.items():
            self._linear(module, factors, across)
        for module, factors in self._names.embedding.items():
            self._embedding(module, factors)
        base_at = np.arange(len(self._table), dtype=np.int64)
        base_at[self._base :] = -1
        adapter_at = np.full(len(self._table), -1, np.int64)
        for tensor, position in self._replaced.items():
            base_at[tensor], adapter_at[tensor] = -1, position
        dtypes = self._adapter.dtypes
        cast = {
            tensor: dtypes[position]
            for tensor, position in self._replaced.items()
            if dtypes[position] != self._table.dtypes[tensor]
        }
        return MergePlan(self._table, base_at, adapter_at, self._changes, cast)

    # tensors that are replaced

    def _replace(self, name: str, position: int) -> None:
        stored, shape = self._adapter.names[position], self._adapter.shapes[position]
        tensor = self._placing.at.get(self._placing.name(name))
        new = may_be_new(name, self._config)
        if tensor is None:
            if not new:
                raise self._bad(f"{shown(stored)} belongs to no tensor of {self._label}")
            self._add(self._placing.name(name), position)
            return
        if tensor in self._replaced:
            raise self._bad(f"{shown(stored)} and another one replace one tensor")
        if shape != self._table.shapes[tensor] and not new:
            raise self._shape(position, tensor)
        dtype, held = self._table.dtypes[tensor], self._adapter.dtypes[position]
        if dtype != held and not (dtype in FLOATS and held in FLOATS):
            raise self._bad(f"{shown(stored)} is {held}, and {dtype} in {self._label}")
        self._replaced[tensor] = position
        self._table.shapes[tensor] = shape
        size = DTYPES[dtype].nbytes(math.prod(shape))
        assert size is not None  # whole bytes: both are floats, or it is as it is in the adapter
        self._table.nbytes[tensor] = size

    def _add(self, name: str, position: int) -> None:
        table, adapter = self._table, self._adapter
        if name in self._placing.at:
            raise self._bad(f"{shown(adapter.names[position])} and another one replace one tensor")
        self._replaced[len(table)] = position
        table.names.append(name)
        table.dtypes.append(adapter.dtypes[position])
        table.shapes.append(adapter.shapes[position])
        table.nbytes = np.append(table.nbytes, adapter.nbytes[position])

    # tensors that are changed

    def _linear(self, module: str, factors: Factors, across: dict[str, bool]) -> None:
        a, b = (self._adapter.shapes[factors[half]] for half in "AB")
        tensor = self._target(f"{module}.weight", factors)
        shape = self._table.shapes[tensor]
        if len(a) != len(shape) or len(a) < 2 or len(b) != len(a) or set(b[2:]) - {1}:
            raise self._shape(factors["A"], tensor)
        fits = a[:1] == b[1:2], shape == (*b[:1], *a[1:])
        other_way = len(a) == 2 and shape == (a[1], b[0])
        if not fits[0] or not (fits[1] or other_way):
            raise self._shape(factors["A"], tensor)
        turned = across[module] if fits[1] and other_way else other_way
        left, right = factors["B"], factors["A"]
        width = math.prod(a[1:])
        if turned:
            pair = Factor(right, True, width), Factor(left, True, a[0])
        else:
            pair = Factor(left, False, a[0]), Factor(right, False, width)
        self._change(module, tensor, a[0], pair)
        if "bias" in factors:
            self._bias(module, factors["bias"], b[0])

    def _bias(self, module: str, position: int, rows: int) -> None:
        tensor = self._target(f"{module}.bias", {"bias": position})
        if not self._table.shapes[tensor] == self._adapter.shapes[position] == (rows,):
            raise self._shape(position, tensor)
        scaling = self._config.scaling_of(module, self._steps)
        ones = Factor(-1, False, 1)
        left = Factor(position, False, 1)
        self._changes[tensor] = LowRank(left, ones, 1, rows, 1, scaling, round_first=False)

    def _embedding(self, module: str, factors: Factors) -> None:
        a, b = (self._adapter.shapes[factors[half]] for half in "AB")
        tensor = self._target(f"{module}.weight", factors)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or self._table.shapes[tensor] != (a[1], b[0]):
            raise self._shape(factors["A"], tensor)
        pair = Factor(factors["A"], True, a[1]), Factor(factors["B"], True, a[0])
        self._change(module, tensor, a[0], pair, round_first=True)

    def _target(self, name: str, factors: Factors) -> int:
        """The tensor that matrices change, of a dtype that they can change."""
        tensor = self._placing.position(name)
        if tensor in self._changes:
            raise self._bad(f"two modules change {shown(self._table.names[tensor])}")
        if self._table.dtypes[tensor] not in FLOATS:
            raise self._bad(
                f"cannot merge into {shown(self._table.names[tensor])} of {self._label}, which is "
                f"{self._table.dtypes[tensor]}",
                "give the base in one of " + ", ".join(FLOATS),
            )
        for position in factors.values():
            if self._adapter.dtypes[position] not in FLOATS:
                name, dtype = self._adapter.names[position], self._adapter.dtypes[position]
                raise self._bad(f"{shown(name)} is {dtype}, not one of {', '.join(FLOATS)}")
        return tensor

    def _change(
        self,
        module: str,
        tensor: int,
        held: int,
        pair: tuple[Factor, Factor],
        *,
        round_first: bool = False,
    ) -> None:
        """Note a change by a pair of matrices; ``held`` is the rank that they have."""
        rank = self._config.rank_of(module, self._steps)
        if held != rank:
            raise self._bad(
                f"{shown(module)} has rank {held:,}, and its configuration says {rank:,}",
                "give the configuration that was saved with the weights",
            )
        shape = self._table.shapes[tensor]
        rows, columns = shape[0], math.prod(shape[1:])
        scaling = self._config.scaling_of(module, self._steps)
        self._changes[tensor] = LowRank(*pair, rank, rows, columns, scaling, round_first)

    def _square_ones(self) -> dict[str, bool]:
        """For modules whose weights are square, whether those are (in, out).

        The configuration says so of one module: PEFT overwrites it with what the last one is. The
        others, whose shapes tell, are asked as well, those of the same name in their layer first.
        """
        told: dict[str, set[bool]] = {}
        square = []
        for module, factors in self._names.linear.items():
            a, b = (self._adapter.shapes[factors[half]] for half in "AB")
            shape = self._table.shapes[self._placing.position(f"{module}.weight")]
            if len(shape) != 2 or len(a) != 2 or len(b) != 2:
                continue
            if a[1] == b[0]:
                square.append(module)
            else:
                told.setdefault(module.rpartition(".")[2], set()).add(shape == (a[1], b[0]))
        everywhere = {answer for answers in told.values() for answer in answers}
        everywhere.add(self._config.transposed)
        found = {}
        for module in square:
            answers = told.get(module.rpartition(".")[2], everywhere)
            if len(answers) > 1:
                raise self._bad(
                    f"{shown(module)} is square, so it is not clear whether its weight is "
                    "transposed",
                    "merge it with PEFT, and compare what that saves",
                )
            (found[module],) = answers
        return found

    # errors

    def _shape(self, position: int, tensor: int) -> CheckpointError:
        stored, shape = self._adapter.names[position], self._adapter.shapes[position]
        return self._bad(
            f"{shown(stored)} has shape {list(shape)}, which does not fit "
            f"{list(self._table.shapes[tensor])} of {shown(self._table.names[tensor])} in "
            f"{self._label}"
        )

    def _bad(self, problem: str, hint: str = _OTHER_BASE) -> CheckpointError:
        return CheckpointError(f"{self._where}: {problem}", hint=hint)

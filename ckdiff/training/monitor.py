"""How far training has moved the weights, while it trains: counted where the weights are."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ckdiff.checkpoints.opening import Given
from ckdiff.errors import PairingError, UsageError, printable
from ckdiff.rules import Rule
from ckdiff.stores.matching import several
from ckdiff.stores.summaries import density, module_of
from ckdiff.training.monitorlog import UpdateLog, leads
from ckdiff.training.watching import (
    Int64,
    Sight,
    Watch,
    Watched,
    added_up,
    checked_watch,
    look_at,
)
from ckdiff.training.watchingcopies import Copies, Keep, checked_keep, load
from ckdiff.training.watchingcounts import Pair, count


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted of some tensors together."""

    elements: int
    changed: int  #: that differ from the start
    changed_since_last: int | None = None  #: that differ from the last look, if that is watched

    @property
    def density(self) -> float:
        """changed / elements."""
        return density(self.changed, self.elements)

    @property
    def density_since_last(self) -> float | None:
        """The same of what differs from the last look."""
        last = self.changed_since_last
        return None if last is None else density(last, self.elements)

    def to_dict(self) -> dict[str, Any]:
        """Counts and densities, for JSON."""
        found: dict[str, Any] = {"elements": self.elements}
        found |= {"changed": self.changed, "density": self.density}
        if self.changed_since_last is not None:
            found["changed_since_last"] = self.changed_since_last
            found["density_since_last"] = self.density_since_last
        return found


@dataclass(frozen=True, eq=False, repr=False)
class Look(Mapping[str, float]):
    """What a look found: a mapping of module to density against the start.

    ``look["self_attn.q_proj"]`` is the share of elements that differ from the start, from 0 to 1,
    in all modules of that name. ``model`` has the counts of everything that is watched.
    """

    step: int  #: as the caller counts them
    rule: str
    model: Counted
    modules: dict[str, Counted]  #: by module, in the model's order
    #: what was watched and cannot be compared any more, or is new: it is in no count
    uncompared: list[str] = field(default_factory=list)
    seconds: float = 0.0  #: that the look took

    def __getitem__(self, module: str) -> float:
        return self.modules[module].density

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __repr__(self) -> str:
        share = f"{100 * self.density:.4g} % of {self.elements:,} elements differ"
        return f"<Look at step {self.step}: {share}, {len(self)} modules>"

    @property
    def elements(self) -> int:
        """Elements that were compared, of all processes."""
        return self.model.elements

    @property
    def changed(self) -> int:
        """How many of them differ from the start."""
        return self.model.changed

    @property
    def density(self) -> float:
        """changed / elements, from 0 to 1."""
        return self.model.density

    @property
    def density_since_last(self) -> float | None:
        """The share that differs from the last look; None without ``since_last``."""
        return self.model.density_since_last

    @property
    def since_last(self) -> dict[str, float] | None:
        """The same by module."""
        found = {name: counted.density_since_last for name, counted in self.modules.items()}
        whole = {name: value for name, value in found.items() if value is not None}
        return None if self.density_since_last is None else whole

    def metrics(self, prefix: str = "update") -> dict[str, float]:
        """Numbers by name, for a logger: ``update/density``, ``update/density/MODULE`` and, with
        ``since_last``, ``update/density_since_last`` likewise.
        """
        found = {f"{prefix}/density": self.density}
        found |= {f"{prefix}/density/{name}": value for name, value in self.items()}
        if self.density_since_last is not None:
            found[f"{prefix}/density_since_last"] = self.density_since_last
            last = self.since_last or {}
            found |= {f"{prefix}/density_since_last/{name}": v for name, v in last.items()}
        if self.uncompared:
            found[f"{prefix}/uncompared"] = len(self.uncompared)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, as in a line of the log."""
        return {
            "step": self.step,
            "rule": self.rule,
            **self.model.to_dict(),
            "modules": {name: counted.to_dict() for name, counted in self.modules.items()},
            "uncompared": self.uncompared,
            "seconds": round(self.seconds, 6),
        }


class UpdateMonitor:
    """Measures which share of a model's weights differs from the start, and from the last look.

    ::

        monitor = UpdateMonitor(model, every=100, log="updates.jsonl")
        for batch in batches:
            ...
            optimizer.step()
            monitor.step()           # a Look at every hundredth call, else None

    The start is the weights when the monitor is made, or ``base``: a checkpoint (a path,
    ``hf://...``, a state dict, a module) with the model's names and shapes. ``rule`` says when an
    element counts as changed. ``exact`` compares the bits as stored; ``exact@bf16`` compares
    float32 weights after rounding them to bfloat16.

    ``watch``: ``trainable`` parameters (those with ``requires_grad``; in a PEFT model, the
    adapter), all ``parameters``, or ``all`` (also saved buffers). Tied weights count once.

    Memory: one copy of the watched weights for the start, and with ``since_last`` another for the
    last look. ``keep="device"`` keeps them beside the weights, ``keep="cpu"`` in the processor's
    memory (pinned, if there is CUDA); then a look copies them over in slices. ``nbytes`` is their
    size in this process.

    Sharded models (FSDP2, tensor parallelism): every process makes a monitor once the model is
    sharded, and calls ``look`` at the same steps. Each counts its part, and only counts are
    communicated. Under DDP nothing is communicated, so one process is enough.

    Raises UsageError and RuleError for wrong arguments, PairingError for a base that does not fit,
    CheckpointError for a base that cannot be opened or weights that cannot be read, OutputError if
    the log is another kind of file.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Given | None = None,
        *,
        every: int = 1,
        rule: str | Rule = "exact",
        watch: Watch = "trainable",
        since_last: bool = True,
        keep: Keep = "device",
        log: str | os.PathLike[str] | None = None,
    ) -> None:
        self._model, self._every, self._rule = model, checked_every(every), Rule.parse(rule)
        self._watch = checked_watch(watch)
        self._log = None if log is None or not leads() else UpdateLog(log)
        self._steps = 0
        self._start = Copies(checked_keep(keep))
        sight = self._sight()
        if base is None:
            self._start.take(sight.tensors)
        else:
            load(self._start, sight.tensors, base, self._rule)
        self._last = Copies(checked_keep(keep)) if since_last else None
        if self._last is not None:
            self._last.take(sight.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies that are kept in this process."""
        return self._start.nbytes + (0 if self._last is None else self._last.nbytes)

    def step(self) -> Look | None:
        """Call it after each step of the optimizer; every ``every``-th call is a look.

        Raises the errors of ``look``.
        """
        self._steps += 1
        return self.look() if self._steps % self._every == 0 else None

    def look(self, step: int | None = None) -> Look:
        """Count now what differs from the start and from the last look, by module.

        ``step`` is the number in the log, by default how often ``step()`` was called. Do not call
        it while something trains: that raises SourceChanged. Raises UsageError if the model is now
        sharded in another way, PairingError if none of the watched weights is left, and OutputError
        if the log cannot be written.
        """
        began = time.perf_counter()
        sight = self._sight()
        tensors, pairs, uncompared = self._paired(sight)
        renew = None if self._last is None else 1
        try:
            here = count(pairs, self._rule, renew)
        except BaseException:  # the last look is now, as far as it can be said
            if self._last is not None:
                self._last.renew(tensors)
            raise
        counts = added_up(tensors, here)
        look = Look(
            self._steps if step is None else step,
            str(self._rule),
            _counted(tensors, counts),
            _by_module(tensors, counts),
            uncompared,
            time.perf_counter() - began,
        )
        if self._log is not None:
            self._log.add(look.to_dict())
        return look

    def _sight(self) -> Sight:
        sight = look_at(self._model, self._watch, self._start.names)
        if not sight.tensors:
            what = "no trainable parameters" if self._watch == "trainable" else "nothing to watch"
            raise UsageError(
                f"the model has {what}", hint='watch="parameters" takes those that are frozen too'
            )
        return sight

    def _paired(self, sight: Sight) -> tuple[list[Watched], list[Pair], list[str]]:
        """What can be compared, each with its copies, and the names of what cannot."""
        tensors, pairs = [], []
        uncompared = list(sight.left_out)
        for tensor in sight.tensors:
            copies = [kept.of(tensor) for kept in (self._start, self._last) if kept is not None]
            known = [copy for copy in copies if copy is not None]
            if len(known) < len(copies):
                uncompared.append(tensor.name)
                continue
            tensors.append(tensor)
            pairs.append(Pair(tensor.here, tensor.held, known))
        here = {tensor.name for tensor in sight.tensors}
        uncompared += [name for name in self._start.names if name not in here]
        if not tensors:
            raise PairingError(
                f"none of the watched weights is as it was: {several(uncompared)}",
                hint="make a new monitor once the model is ready to be trained",
            )
        return tensors, pairs, uncompared


def checked_every(value: object) -> int:
    """``value`` if it is a number of steps; raises UsageError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"every must be at least 1 step, not {printable(repr(value))[:60]}")
    return value


def _by_module(tensors: list[Watched], counts: Int64) -> dict[str, Counted]:
    rows: dict[str, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        rows[module_of(tensor.name)].append(i)
    return {name: _counted([tensors[i] for i in some], counts[some]) for name, some in rows.items()}


def _counted(tensors: list[Watched], counts: Int64) -> Counted:
    elements = sum(tensor.elements for tensor in tensors)
    start, *last = np.sum(counts, axis=0).tolist()
    return Counted(elements, start, last[0] if last else None)

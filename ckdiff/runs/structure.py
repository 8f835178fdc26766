"""The shape of an update: where in its matrices the changed elements are, from mask stores.

One pass over the masks, in memory that does not grow with the model: of a matrix only its rows and
columns are counted.
"""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext

import numpy as np

from ckdiff.checkpoints.opening import Given
from ckdiff.errors import BudgetError, UsageError
from ckdiff.options import Observer, checked_int, checked_observer, several_texts
from ckdiff.rules import Rule
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.runs.structures.counting import Counts, ProfileTask
from ckdiff.runs.structures.dealing import pieces, worker_memory
from ckdiff.runs.structures.energy import Energies
from ckdiff.runs.structures.file import ProfileFile
from ckdiff.runs.structures.modules import Stripes
from ckdiff.runs.structures.result import Structure, as_matrix
from ckdiff.stores.maskstore import MaskStore
from ckdiff.stores.matching import Matched, StorePath, match
from ckdiff.stores.table import IntArray
from ckdiff.stores.tally import miscounted


def structure(
    stores: StorePath | Sequence[StorePath],
    *,
    rule: str | Rule | None = None,
    base: Given | None = None,
    tuned: Given | None = None,
    key: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    profiles: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> Structure:
    """Find where in its matrices an update is: rows, columns, blocks, fours; for 1 to 64 stores.

    With ``base`` and ``tuned``, the checkpoints of a single store, it also measures how the energy
    of the update is spread. ``key`` is the path of the state dict in a torch file that holds more.
    ``include`` and ``exclude`` are globs of tensor names. ``profiles`` is a safetensors file to
    write row and column counts to. Raises a CkdiffError: UsageError, PairingError, CheckpointError,
    StoreCorrupt, BudgetError.
    """
    observer, began = checked_observer(observer), time.perf_counter()
    listed = [stores] if isinstance(stores, (str, os.PathLike, MaskStore)) else list(stores)
    _check_asked(base, tuned, len(listed), workers)
    matched = match(listed, rule, least=1)
    for note in matched.notes():
        observer.note(note)
    chosen = _chosen(matched, several_texts("include", include), several_texts("exclude", exclude))
    result = _empty(matched, chosen)
    with ExitStack() as stack:
        energies = None
        if base is not None and tuned is not None:
            energies = stack.enter_context(Energies(matched, chosen, base, tuned, key=key))
        file = None if profiles is None else ProfileFile(profiles, result, overwrite=overwrite)
        counting = _Counting(result, matched, chosen, file)
        many = _fit(workers, counting, energies, memory)
        with interruptible(), file or nullcontext():
            counting.run(many, observer)
            if energies is not None:
                result.energies, result.unmeasured = energies.measure(many, observer)
            if file is not None:
                file.commit()
                result.profiles = str(file.out)
    result.seconds = time.perf_counter() - began
    return result


def with_stripes(
    matched: Matched, *, memory: str | int | None, observer: Observer
) -> tuple[Structure, Stripes]:
    """Of stores that are open the structure of every matrix, and its stripes, in one pass."""
    chosen = [i for i, shape in enumerate(matched.shapes) if len(shape) > 1]
    result = _empty(matched, np.array(chosen, np.int64))
    stripes = Stripes(result)
    if chosen:
        counting = _Counting(result, matched, np.array(chosen, np.int64), None)
        counting.heard = stripes
        many = _fit(None, counting, None, memory)
        with interruptible():
            counting.run(many, observer)
    return result, stripes


def _empty(matched: Matched, chosen: IntArray) -> Structure:
    return Structure(
        [str(store.path) for store in matched.stores],
        matched.rule,
        [matched.names[i] for i in chosen],
        [matched.dtypes[i] for i in chosen],
        [matched.shapes[i] for i in chosen],
        matched.left_out,
        sum(len(shape) < 2 for shape in matched.shapes),
    )


def _check_asked(base: Given | None, tuned: Given | None, stores: int, workers: int | None) -> None:
    if workers is not None and checked_int("workers", workers) < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    if (base is None) != (tuned is None):
        raise UsageError(
            "the energy of an update needs both checkpoints",
            hint="give --base and --tuned, or neither",
        )
    if base is not None and stores != 1:
        raise UsageError(
            f"--base and --tuned are the checkpoints of one store, and {stores} were given",
            hint="look at one store at a time",
        )


def _chosen(matched: Matched, include: list[str], exclude: list[str]) -> IntArray:
    """Positions of the matrices that are looked at. Raises UsageError where there are none."""
    found = []
    for i, (name, shape) in enumerate(zip(matched.names, matched.shapes, strict=True)):
        if len(shape) < 2 or any(fnmatch.fnmatchcase(name, glob) for glob in exclude):
            continue
        if not include or any(fnmatch.fnmatchcase(name, glob) for glob in include):
            found.append(i)
    if not found:
        raise UsageError(
            "none of the chosen tensors has two dimensions or more",
            hint="see ckdiff show --by tensor for names and shapes",
        )
    return np.array(found, np.int64)


class _Counting:
    """The pass over the masks: small matrices become numbers at once, parts of large ones wait."""

    def __init__(
        self, result: Structure, matched: Matched, chosen: IntArray, file: ProfileFile | None
    ) -> None:
        self._result, self._file = result, file
        self.heard: Callable[[Counts], None] = lambda counts: None  #: told of each whole matrix
        said = matched.said().only(chosen)
        shapes = [as_matrix(shape) for shape in result.shapes]
        self.task = ProfileTask(
            said, matched.starts[:, chosen], shapes, pieces(said.layout, shapes), self._take
        )
        self._waiting: dict[int, tuple[Counts, int]] = {}  # with how many rows have come

    def need(self) -> Need:
        """Memory: what is said of matrices, and parts of those that are large."""
        stores, shapes = len(self._result.stores), self.task.shapes
        line = 8 * (12 + 6) * stores + 16 * len(self._result.pairs) + 400
        return Need(
            tables=line * len(shapes),
            worker=worker_memory(shapes, stores, written=self._file is not None),
        )

    def run(self, workers: int, observer: Observer) -> None:
        """Count everything. Raises StoreCorrupt."""
        chunks = len(self.task.pieces)
        meter = Meter(observer, len(self._result.stores) * self.task.said.layout.total // 8)
        self.task.on_bytes = meter.add
        workers = max(1, min(workers, chunks))
        run_chunks(range(chunks), self.task, workers=workers, done=self._done, meter=meter)

    def _take(self, counts: Counts) -> None:
        """Use what was counted of a whole matrix. Raises StoreCorrupt where that is not as many
        ones as its store says.
        """
        said = self.task.said
        wrong = np.flatnonzero(counts.rows.sum(1) != said.changed[:, counts.tensor])
        if wrong.size:
            raise miscounted(said, int(wrong[0]), counts.tensor)
        self._result.take(counts)
        self.heard(counts)
        if self._file is not None:
            self._file.put(counts)

    def _done(self, chunk: int, rows: Counts | None) -> None:
        if rows is None:
            return
        whole, come = self._waiting.pop(rows.tensor, (None, 0))
        if whole is None:
            whole = Counts.none(rows.tensor, self.task.shapes[rows.tensor], len(rows.rows))
        whole.join(rows)
        come += rows.rows.shape[1]
        if come < whole.rows.shape[1]:
            self._waiting[rows.tensor] = whole, come
        else:
            whole.close()
            self._take(whole)


def _fit(
    workers: int | None, counting: _Counting, energies: Energies | None, memory: str | int | None
) -> int:
    """How many workers there will be. Raises BudgetError where one does not fit."""
    need = counting.need()
    if energies is not None:
        more = energies.need()
        need = Need(need.tables + more.tables, max(need.worker, more.worker))
    try:
        return fit_workers(workers, max(1, len(counting.task.pieces)), need, memory)
    except BudgetError as error:
        rows, width = max(counting.task.shapes, key=sum)
        raise BudgetError(
            f"{error.message}; the largest matrix has {rows:,} rows and {width:,} columns",
            hint=f"{error.hint}, or leave it out with --exclude",
        ) from None

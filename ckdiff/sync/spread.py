"""A publisher's side of a model that is spread over processes: what it keeps, and each version."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from ckdiff.checkpoints.opening import Given
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.following import unsayable
from ckdiff.deltas.versions.form import Said, version_name
from ckdiff.deltas.versions.reading import WeightStream
from ckdiff.outputs.companions import Copying
from ckdiff.outputs.copied import write_companions
from ckdiff.outputs.place import Place
from ckdiff.sync.casting import PublishedView, as_published
from ckdiff.sync.loading import Loaded, Where, load, moved_on
from ckdiff.sync.making import elements_of
from ckdiff.sync.outcome import Published, Settings, cannot_say
from ckdiff.sync.sharded import Declared, Gathering, Processes, owners, ties
from ckdiff.sync.snapshot import Snapshot

T = TypeVar("T")


@dataclass(slots=True)
class SpreadPublisher:
    """What each of the processes has. All of them call the same at the same time."""

    where: Where
    settings: Settings
    base: Given | None  #: a path
    config_from: str | os.PathLike[str] | None
    _state: Loaded | None = None  #: None until the first version, and after an error

    @property
    def version(self) -> int:
        """The newest version that is known to be complete."""
        return self._state.version if self._state is not None else 0

    def publish(self, given: Given, *, full: bool) -> Published:
        """See Publisher."""
        began = time.perf_counter()
        processes = Processes()
        model = _declared(processes, given)
        state = self._loaded(processes, model)
        view = as_published(model, state.table, self.where.dtype, ties(given))
        number = state.version + 1
        full = full or state.table is None or self.settings.is_due(number, state.last_full)
        why = None
        if state.table is not None:
            why = unsayable(state.table, view.table, self.settings.encoding)
        processes.together(lambda: self._check(state, why, full))
        self._state = None  # until it is complete
        try:
            found = self._made(processes, model, view, state, full=full)
        except BaseException:
            if state.snapshot is not None:
                state.snapshot.close()
            raise
        self._state = state
        found.seconds = time.perf_counter() - began
        return found

    def close(self) -> None:
        """Give the snapshot back."""
        if self._state is not None and self._state.snapshot is not None:
            self._state.snapshot.close()
        self._state = None

    def _loaded(self, processes: Processes, model: Declared) -> Loaded:
        """Where the stream stands, with what this process keeps of it."""
        if self._state is not None:
            return self._state
        mine = owners(model.table, processes.count)
        names = {name for name, rank in mine.items() if rank == processes.rank}
        where = replace(self.where, only=names)
        state = processes.together(lambda: _Local(load(where, self.base)))[processes.rank].value
        assert state is not None
        return state

    def _check(self, state: Loaded, why: str | None, full: bool) -> None:
        if WeightStream(str(self.where.stream), Room()).newest != state.version:
            raise moved_on(self.where.stream, state.version)
        if why is not None and not full:
            raise cannot_say(why)

    def _made(
        self,
        processes: Processes,
        model: Declared,
        view: PublishedView,
        state: Loaded,
        *,
        full: bool,
    ) -> Published:
        number, table = state.version + 1, view.table
        place = Place(self.where.stream / version_name(number), directory=True, overwrite=False)
        if full:
            self._anew(processes, view, state)
        assert state.snapshot is not None
        work = Gathering(processes, model, view, state.snapshot, place, lambda: None)
        if full:
            size = int(table.nbytes.sum())
            written = work.full(self._companions, self.where.options)
            found = Published(number, True, len(table), size, written, 1.0, 0.0)
            state.last_full = number
        else:
            said = Said(number, state.version, self.settings.encoding, self.settings.checksum)
            total, written = work.delta(said)
            density = total.elements / max(1, elements_of(table))
            found = Published(number, False, total.tensors, total.changed, written, density, 0.0)
        state.version = number
        return found

    def _anew(self, processes: Processes, view: PublishedView, state: Loaded) -> None:
        """A snapshot for all tensors that there are now."""
        if state.snapshot is not None:
            state.snapshot.close()
        mine, table = owners(view.table, processes.count), view.table
        chosen = [i for i, name in enumerate(table.names) if mine[name] == processes.rank]
        part = TensorTable(
            [table.names[i] for i in chosen],
            [table.dtypes[i] for i in chosen],
            [table.shapes[i] for i in chosen],
            table.nbytes[chosen],
        )

        def make() -> None:
            state.snapshot = Snapshot(part, self.where.kind, self.where.stream)

        processes.together(make)
        state.table = table

    def _companions(self, folder: Path) -> None:
        if self.config_from is not None:
            copying = Copying.checked(self.config_from, True)
            write_companions(folder, copying.beside(Declared({}), directory=True).files)


class _Local(Generic[T]):
    """Something of this process that is not sent to the others."""

    def __init__(self, value: T | None) -> None:
        self.value = value

    def __reduce__(self) -> tuple[type[_Local[T]], tuple[None]]:
        return type(self), (None,)


def _declared(processes: Processes, given: Given) -> Declared:
    """The model, if it is spread over all processes."""

    def declare() -> _Local[Declared]:
        model = Declared(given)
        model.check(processes.count)
        return _Local(model)

    model = processes.together(declare)[processes.rank].value
    assert model is not None
    return model

"""Publishing the weights of a process: after each step, what changed since the one before."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from typing import Self

from ckdiff.checkpoints.opening import Given, open_checkpoint, open_in
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.conversions.convert import convert
from ckdiff.conversions.dtypes import checked_dtype
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.following import Following, unsayable
from ckdiff.deltas.versions.form import CONTENT, PACKED, Said, version_name
from ckdiff.deltas.versions.reading import WeightStream
from ckdiff.deltas.versions.writepacked import PackedMaking
from ckdiff.errors import CkdiffError, UsageError
from ckdiff.options import Observer, Options, checked_observer, checked_output
from ckdiff.outputs.place import Place, write_errors
from ckdiff.sync.casting import PublishedView, as_published, memory_of
from ckdiff.sync.loading import Loaded, Where, copy_into, is_reopened, load, moved_on
from ckdiff.sync.making import Making, elements_of, size_of
from ckdiff.sync.outcome import Published, Settings, cannot_say
from ckdiff.sync.sharded import is_spread, several
from ckdiff.sync.snapshot import Snapshot, checked_kind
from ckdiff.sync.spread import SpreadPublisher


class Publisher:
    """Publishes what changed since the newest version of ``stream``, step after step.

    ``base`` is the checkpoint that the stream begins with (version 0, which engines have), or what
    its newest version leads to: a path, a module or a state dict. Without one, the first version of
    an empty stream is a full one; a stream that has a full version goes on from that. ``encoding``
    is ``xor``, ``overwrite``, or ``packed`` for readers that use ckdiff. Every ``anchor_every``
    versions there is a full one. Floats are rounded to the dtypes that the base has; ``dtype``
    (``bf16``, ``f16``, ``f32``) is the one of versions without a base in files.

    It keeps one copy of the model's bytes as published. ``snapshot="memory"`` keeps it in memory,
    ``"disk"`` in an unnamed file beside the versions, and ``"auto"`` wherever there is room. With
    ``"device"`` there are also copies beside the weights on a GPU, so that only changes come from
    there. ``memory`` limits all other memory. With ``background``, a call returns when everything
    is compared, and a thread writes the version to the disk; the next call raises its errors.
    Config and tokenizer files of full versions come from ``config_from``, or from the base.

    A version appears only when it is complete. After an error, the next one is made from the newest
    complete version. Use it from one thread, as a context manager. Raises UsageError, the errors of
    opening the base, DeltaError for a stream that is damaged or that somebody else wrote to, and
    BudgetError.
    """

    def __init__(
        self,
        stream: str | os.PathLike[str],
        base: Given | None = None,
        *,
        encoding: str = "xor",
        checksum: str = "xxh3-128",
        anchor_every: int | None = None,
        dtype: str | None = None,
        snapshot: str = "auto",
        background: bool = False,
        memory: str | int | None = None,
        workers: int | None = None,
        config_from: str | os.PathLike[str] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._settings = Settings.checked(encoding, checksum, anchor_every, background)
        self._where = Where(
            checked_output(stream),
            checked_kind(snapshot),
            checked_dtype(dtype),
            Options(workers=workers, memory=memory),
            checked_observer(observer),
        )
        self._config_from = config_from
        with write_errors(self._where.stream):
            self._where.stream.mkdir(parents=True, exist_ok=True)
        self._base = base if is_reopened(base) else None
        self._spread: SpreadPublisher | None = None
        self._closed = False
        # of several processes each keeps a part, once it is known which, or one of them all of it
        later = several() and (base is None or self._base is not None)
        self._state: Loaded | None = None if later else load(self._where, base)
        self._ahead = False  # whether the snapshot may differ from the newest version
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def version(self) -> int:
        """The newest version that is known to be complete; 0 if there is none."""
        if self._spread is not None:
            return self._spread.version
        return self._there.version

    def publish(self, model: Given, *, full: bool = False) -> Published:
        """Publish a module or a state dict as the next version, as it is at the time of the call.

        Only what changed is written, unless ``full`` or an anchor is due. Nothing may write to the
        tensors until it returns. Raises DeltaError for a change that a delta cannot express
        (tensors that were added, removed, reshaped or retyped), SourceChanged, BudgetError,
        OutputError, Interrupted, and errors in the background since the last call.
        """
        began = time.perf_counter()
        self.wait()
        if several() and is_spread(model):
            return self._of_several().publish(model, full=full)
        with ExitStack() as stack:
            opened = open_in(stack, model, open_checkpoint)
            self._settle()
            state = self._there
            if WeightStream(str(self._where.stream), Room()).newest != state.version:
                raise moved_on(self._where.stream, state.version)
            like = state.table
            view = as_published(opened, like, self._where.dtype, memory_of(model))
            due = self._settings.is_due(state.version + 1, state.last_full)
            full = full or state.snapshot is None or due
            why = None if like is None else unsayable(like, view.table, self._settings.encoding)
            if why is not None and not full:
                raise cannot_say(why)
            found = self._full(view, same=why is None) if full else self._delta(view)
        found.seconds = time.perf_counter() - began
        return found

    def wait(self) -> None:
        """Wait until everything published is on the disk; raises the errors of writing it."""
        thread = self._thread
        if thread is not None:
            thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the last version, and free the snapshot; may be called more than once.

        Raises the errors in the background since the last call.
        """
        try:
            self.wait()
        finally:
            if self._state is not None and self._state.snapshot is not None:
                self._state.snapshot.close()
            if self._spread is not None:
                self._spread.close()
            self._state, self._spread, self._closed = None, None, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.close()
            return
        with suppress(CkdiffError):  # one error is on its way already
            self.close()

    @property
    def _there(self) -> Loaded:
        if self._closed:
            raise UsageError("the publisher was closed", hint="make a new one")
        if self._state is None:
            self._state = load(self._where, self._base)
        return self._state

    def _of_several(self) -> SpreadPublisher:
        """What publishes a model that is spread over processes."""
        if self._closed:
            raise UsageError("the publisher was closed", hint="make a new one")
        if self._settings.encoding == PACKED:
            raise UsageError(
                "a model that is spread over processes cannot be published as packed versions",
                hint='publish it with encoding="xor", and convert these with ckdiff convert-delta',
            )
        if self._state is not None:
            raise UsageError(
                "for a model that is spread over processes the base must be a path",
                hint="give the directory that the processes load the model from",
            )
        if self._spread is None:
            self._spread = SpreadPublisher(self._where, self._settings, self._base, self._beside())
        return self._spread

    def _settle(self) -> None:
        """See to it that the snapshot is the newest version: after an error it is made again."""
        state = self._there
        if not self._ahead:
            return
        if state.snapshot is not None:
            state.snapshot.close()
        state.snapshot = None
        newest = WeightStream(str(self._where.stream), Room()).newest
        why = "the base was in memory, and is there no more"
        try:
            loaded = load(self._where, self._base)
        except CkdiffError as error:
            why, loaded = error.one_line(), Loaded(None, newest, state.last_full)
        if loaded.snapshot is None and state.table is not None:
            self._where.observer.note(f"the next version is a full one: {why}")
            loaded.table = state.table  # what it is to be like all the same
        self._state, self._ahead = loaded, False

    def _touched(self) -> None:
        self._ahead = True

    def _packed(self, view: PublishedView) -> Published:
        """A packed version is made of both sides; then the snapshot is brought up to date."""
        state, where = self._there, self._where
        assert state.snapshot is not None
        following = Following(state.version + 1, state.version)
        said = Said(following.number, following.base_version, PACKED, CONTENT)
        making = PackedMaking(state.snapshot, view, where.stream, said, where.options)
        making.prepare()
        made = making.run(following, Room(where.options.memory), where.observer)
        state.version = said.version
        self._touched()
        copy_into(state.snapshot, state.snapshot.advanced(view, where.observer.note), where)
        self._ahead = False
        return Published(
            said.version, False, made.tensors, made.changed_bytes, made.bytes, made.density, 0.0
        )

    def _delta(self, view: PublishedView) -> Published:
        if self._settings.encoding == PACKED:
            return self._packed(view)
        state = self._there
        assert state.snapshot is not None
        said = Said(
            state.version + 1, state.version, self._settings.encoding, self._settings.checksum
        )
        place = self._place(said.version)
        view = state.snapshot.advanced(view, self._where.observer.note)
        if state.snapshot.shadow is not None:
            self._touched()
        making = Making(state.snapshot, view, said, place)
        try:
            making.encode(self._where.options, self._where.observer, self._touched)
        except BaseException:
            making.close()
            raise
        total = elements_of(state.snapshot.table)
        found = Published(
            said.version, False, making.found.tensors, making.found.changed, making.bytes,
            making.found.elements / total if total else 0.0, 0.0,
        )  # fmt: skip

        def finish() -> None:
            with closing(making):
                making.commit()
            state.version = said.version
            self._ahead = False

        self._finish(finish)
        return found

    def _full(self, view: PublishedView, *, same: bool) -> Published:
        """Publish all of it; ``same`` says that the snapshot has its tensors."""
        state, number = self._there, self._there.version + 1
        out = self._place(number).out
        self._ahead = True
        if state.snapshot is None or not same:
            if state.snapshot is not None:
                state.snapshot.close()
            state.snapshot = None
            state.snapshot = Snapshot(view.table, self._where.kind, self._where.stream)
            state.table = view.table
        snapshot = state.snapshot
        copy_into(snapshot, snapshot.advanced(view, self._where.observer.note), self._where)
        size = int(snapshot.table.nbytes.sum())
        found = Published(number, True, len(snapshot.table), size, size, 1.0, 0.0)
        options, observer, beside = self._where.options, self._where.observer, self._beside()
        if beside is None:
            observer.note(
                "a full version without config and tokenizer files, which readers that begin with "
                "it need: config_from= says where they are"
            )

        def finish() -> None:
            convert(
                snapshot, out, workers=options.workers, memory=options.memory,
                config_from=beside, observer=None if self._settings.background else observer,
            )  # fmt: skip
            found.bytes = size_of(out)
            state.version = state.last_full = number
            self._ahead = False

        self._finish(finish)
        return found

    def _finish(self, finish: Callable[[], None]) -> None:
        """Bring a version to its end, here or on a thread."""
        if not self._settings.background:
            finish()
            return

        def run() -> None:
            try:
                finish()
            except BaseException as error:  # raised by the next call
                self._error = error

        # the process does not end before it: whoever forgets to close loses no version
        self._thread = threading.Thread(target=run, name="ckdiff-publisher")
        self._thread.start()

    def _place(self, number: int) -> Place:
        return Place(self._where.stream / version_name(number), directory=True, overwrite=False)

    def _beside(self) -> str | os.PathLike[str] | None:
        """Where the config and tokenizer files of a full version are; None where nowhere is."""
        if self._config_from is not None or self._base is None:
            return self._config_from
        return _folder_of(self._base)


def _folder_of(base: Given) -> str | None:
    """The directory beside whose weights there are config files; None where there is none."""
    from ckdiff.outputs.companions import Copying

    with ExitStack() as stack:
        opened: Checkpoint = open_in(stack, base)
        found = opened.directory
        if found is None and opened.open_files:
            found = os.path.dirname(opened.open_files[0].path)
        return found if found and Copying().beside(opened, directory=True).files else None

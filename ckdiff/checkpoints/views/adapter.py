"""A base with a PEFT LoRA adapter merged into it: what ``merge_and_unload`` would make, not made.

Nothing is merged before it is read. A reader merges the spans that it is asked for, from the bytes
of the base and the small matrices of the adapter; memory does not grow with either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SourceFile
from ckdiff.checkpoints.views.adapterplan import plan_merge
from ckdiff.checkpoints.views.adapterreader import SCRATCH, AdapterReader
from ckdiff.checkpoints.views.peft import CONFIG_LIMIT, CONFIG_NAME, read_config
from ckdiff.errors import CheckpointError, printable


class AdapterView(Checkpoint):
    """A base and an adapter, both open: closed with it. ``config`` is ``adapter_config.json``.

    It is what ``merge_and_unload()`` makes, or with ``safe`` ``merge_and_unload(safe_merge=True)``.
    Tensors that the adapter leaves alone are the base's, in the base's files. Raises
    CheckpointError for an adapter that is not merged here, that does not fit the base, or that
    brings tensors that belong nowhere; both stay open then.
    """

    def __init__(
        self, base: Checkpoint, adapter: Checkpoint, config: bytes, *, safe: bool = False
    ) -> None:
        where = f"{adapter.label}/{CONFIG_NAME}"
        self.base, self.adapter, self.config, self.safe = base, adapter, config, safe
        self._plan = plan_merge(
            base.table, adapter.table, read_config(config, where), (base.label, adapter.label)
        )
        if safe:
            self._plan.round_first()
        self.label = f"{base.label} + {adapter.label}"
        self.table = self._plan.table
        self.files = [
            *base.files,
            *(SourceFile(f"{adapter.label}/{f.name}", f.size, f.content) for f in adapter.files),
        ]
        opened = [*base.open_files, *adapter.open_files]
        self.open_files = opened if len(opened) == len(self.files) else ()
        self.directory = base.directory
        self.notes = (*base.notes, *adapter.notes)
        self.index_name = base.index_name
        origin = {f"adapter_{key}": value for key, value in adapter.origin.items()}
        self.origin: Mapping[str, str] = MappingProxyType(
            {**base.origin, **origin, "adapter": adapter.label, "adapter_config": self._digest}
        )
        self.streams = base.streams

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}: {len(self._plan.changes):,} tensors merged>"

    @property
    def merged(self) -> Sequence[str]:
        """The tensors that the adapter's matrices change, in the order of the table."""
        return [self.table.names[tensor] for tensor in sorted(self._plan.changes)]

    @property
    def replaced(self) -> list[str]:
        """The tensors that the adapter brings whole, in the order of the table."""
        return [self.table.names[i] for i in np.flatnonzero(self._plan.adapter_at >= 0).tolist()]

    # what its files say of it

    @cached_property
    def file_index(self) -> npt.NDArray[np.int32]:
        """See Checkpoint. What is computed is in no file."""
        found = self._of(self.base.file_index, self.adapter.file_index)
        from_adapter = (self._plan.adapter_at >= 0) & (found >= 0)
        found[from_adapter] += len(self.base.files)
        return found.astype(np.int32)

    @cached_property
    def offset(self) -> IntArray:
        """See Checkpoint."""
        return self._of(self.base.offset, self.adapter.offset)

    @property
    def in_files(self) -> bool:
        """False: its files are not those of a model."""
        return False

    def _of(self, base: npt.NDArray[Any], adapter: npt.NDArray[Any]) -> IntArray:
        plan = self._plan
        found = np.full(len(self.table), -1, np.int64)
        for column, at in ((base, plan.base_at), (adapter, plan.adapter_at)):
            found[at >= 0] = column[at[at >= 0]]
        found[[*plan.changes, *plan.cast]] = -1
        return found

    @property
    def borders(self) -> Mapping[int, IntArray]:
        """See Checkpoint: the base's, of what is read from it."""
        at = self._plan.base_at  # a tensor of the base is where it is in the base's table
        return {i: borders for i, borders in self.base.borders.items() if at[i] >= 0}

    # what is to be fetched

    def missing_bytes(self) -> Mapping[tuple[str, ...], int]:
        """See Checkpoint."""
        return {**self.base.missing_bytes(), **self.adapter.missing_bytes()}

    def fetch(self) -> None:
        """See Checkpoint."""
        self.adapter.fetch()
        self.base.fetch()

    # reading

    def reader(self) -> AdapterReader:
        """See Checkpoint."""
        base = self.base.reader()
        adapter = [self.adapter.reader(), self.adapter.reader()]
        return AdapterReader(self._plan, self.adapter.table.dtypes, [base, *adapter])

    def reader_memory(self, window: int) -> int:
        """See Checkpoint: the readers', a window of what is merged, and scratch."""
        sides = self.base.reader_memory(window) + 2 * self.adapter.reader_memory(window)
        return sides + window + SCRATCH

    def read_ahead(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See Checkpoint."""
        at = self._plan.base_at[tensors]
        here = at >= 0
        self.base.read_ahead(at[here], starts[here], nbytes[here])

    def share(self, spool: int, connections: int) -> None:
        """See Checkpoint. Adapters are small: they are downloaded, whatever the base is."""
        self.base.share(spool, connections)

    def hang_up(self) -> None:
        """See Checkpoint."""
        self.base.hang_up()
        self.adapter.hang_up()

    # whether it is still the same

    @cached_property
    def _digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.config + b"\0safe" * self.safe)

    def fingerprint(self) -> list[Any]:
        """Those of both, and a digest of the configuration."""
        return [self.base.fingerprint(), self.adapter.fingerprint(), self._digest]

    def seen(self) -> list[Any]:
        """Those of both, and a digest of the configuration."""
        return [self.base.seen(), self.adapter.seen(), self._digest]

    def recipe(self) -> str:
        """The recipes of both, and the configuration itself: nobody reads it again."""
        sides = {name: json.loads(side.recipe()) for name, side in self._sides().items()}
        return json.dumps({"adapter": {**sides, "config": self.config.decode(), "safe": self.safe}})

    def _sides(self) -> dict[str, Checkpoint]:
        return {"base": self.base, "adapter": self.adapter}

    def verify(self) -> None:
        """See Checkpoint."""
        for side in self._sides().values():
            side.verify()

    def close(self) -> None:
        """Close both."""
        for side in self._sides().values():
            side.close()


def config_beside(adapter: Checkpoint) -> bytes:
    """The ``adapter_config.json`` beside the weights of an adapter, wherever they are.

    Raises CheckpointError where there is none, or none that is a small file.
    """
    if "repository" in adapter.origin:
        return _config_at_hub(adapter)
    directory = adapter.directory
    if directory is None and adapter.open_files:
        directory = os.path.dirname(adapter.open_files[0].path)
    path = os.path.join(directory or "", CONFIG_NAME)
    hint = "an adapter is the directory that PEFT's save_pretrained wrote"
    if directory is None or not os.path.isfile(path):
        raise CheckpointError(f"{printable(adapter.label)} has no {CONFIG_NAME}", hint=hint)
    try:
        with open(path, "rb", buffering=0) as file:
            raw = b""
            while len(raw) <= CONFIG_LIMIT and (more := file.read(CONFIG_LIMIT + 1 - len(raw))):
                raw += more
    except OSError as error:
        problem = f"{printable(path)}: cannot be read: {error.strerror}"
        raise CheckpointError(problem) from None
    return raw


def _config_at_hub(adapter: Checkpoint) -> bytes:
    from ckdiff.checkpoints.places.hub.listing import beside

    try:
        return beside(adapter.origin, CONFIG_NAME, CONFIG_LIMIT)
    except ValueError as error:
        raise CheckpointError(f"{printable(adapter.label)}: {CONFIG_NAME}: {error}") from None


def adapt(base: Checkpoint, adapter: Checkpoint, *, safe: bool = False) -> AdapterView:
    """A base with an adapter; both are closed with it. Raises CheckpointError."""
    return AdapterView(base, adapter, config_beside(adapter), safe=safe)

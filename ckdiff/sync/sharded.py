"""Publishing a model that is spread over processes, as FSDP2 and DTensor spread it.

Each tensor belongs to one process, which keeps its snapshot and makes its frame. Tensors are
gathered one at a time, by all processes in the same order, so that none ever holds the model. Each
writes files of its own into the directory of the version, on a file system that all of them share;
the first gives them their names, writes the index, and puts the version in its place.

All processes take the same way through this file: whoever fails says so when all meet again.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ckdiff.checkpoints.opening import Given, open_local
from ckdiff.checkpoints.places.held import KNOWN_DTYPES
from ckdiff.checkpoints.places.memory import open_memory
from ckdiff.checkpoints.protocol import Checkpoint, SpanReader, TensorTable
from ckdiff.conversions.convert import convert
from ckdiff.deltas.versions.encoding import Tools, window_of
from ckdiff.deltas.versions.form import INDEX_NAME, Said, index_bytes, parse_index, shard_name
from ckdiff.deltas.versions.shards import Shards
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CkdiffError, OutputError, UsageError, printable
from ckdiff.outputs.place import Place, write_errors
from ckdiff.sync.casting import PublishedView
from ckdiff.sync.loading import copy_tensor
from ckdiff.sync.making import Advancing, Found
from ckdiff.sync.snapshot import Snapshot

T = TypeVar("T")


def is_spread(given: object) -> bool:
    """Whether a module or a state dict has tensors of which this process holds a part."""
    return any(_spread(value) for value in _state(given).values())


def several() -> bool:
    """Whether there are other processes, as far as torch says."""
    import sys

    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available():
        return False
    return bool(distributed.is_initialized() and distributed.get_world_size() > 1)


class Processes:
    """Those that publish together: all of torch's default group."""

    def __init__(self) -> None:
        from torch import distributed

        self._torch: Any = distributed
        self.rank = int(distributed.get_rank())
        self.count = int(distributed.get_world_size())

    def together(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gives in each process; where it raises anywhere, all raise.

        What it gives has to be small. It must not communicate itself.
        """
        error: BaseException | None = None
        mine: tuple[str | None, Any]
        try:
            mine = None, work()
        except BaseException as raised:
            error = raised
            text = raised.message if isinstance(raised, CkdiffError) else repr(raised)
            mine = text, None
        found: list[Any] = [None] * self.count
        self._torch.all_gather_object(found, mine)
        if error is not None:
            raise error
        for rank, (text, _) in enumerate(found):
            if text is not None:
                raise OutputError(
                    printable(f"process {rank} could not publish: {text}"),
                    hint="nothing was published",
                )
        # its own value need not be one that can be sent
        values: list[Any] = [value for _, value in found]
        values[self.rank] = mine[1]
        return values


class Declared(Checkpoint):
    """The tensors of a spread model, by name and shape: to be gathered before they are read."""

    label = "the model"

    def __init__(self, given: Given) -> None:
        """Raises UsageError for tensors that are spread over others than all processes."""
        self.values = {n: v for n, v in _state(given).items() if hasattr(v, "untyped_storage")}
        names = list(self.values)
        dtypes = [
            KNOWN_DTYPES.get(str(v.dtype).removeprefix("torch.")) for v in self.values.values()
        ]
        for name, dtype in zip(names, dtypes, strict=True):
            if dtype is None:
                raise UsageError(
                    f"{printable(name)} has a dtype that safetensors files do not have"
                )
        counts = [int(value.numel()) for value in self.values.values()]
        kinds = [str(dtype) for dtype in dtypes]
        nbytes = [n * DTYPES[kind].bits // 8 for n, kind in zip(counts, kinds, strict=True)]
        shapes = [tuple(value.shape) for value in self.values.values()]
        self.table = TensorTable(names, kinds, shapes, np.array(nbytes, np.int64))

    def reader(self) -> SpanReader:
        """See Checkpoint. There is none."""
        raise UsageError("the model is spread over processes")

    def fingerprint(self) -> list[Any]:
        """See Checkpoint."""
        return ["spread"]

    def check(self, count: int) -> None:
        """Raise UsageError unless ``count`` processes hold each spread tensor together."""
        for name, value in self.values.items():
            if _spread(value) and value.device_mesh.size() != count:
                raise UsageError(
                    f"{printable(name)} is spread over {value.device_mesh.size()} of {count} "
                    "processes",
                    hint="publish from a job whose processes hold the model together",
                )


def owners(table: TensorTable, count: int) -> dict[str, int]:
    """Which process keeps each tensor: about as many bytes for each, the same answer in all."""
    loads = [0] * count
    found: dict[str, int] = {}
    sizes = zip(table.names, table.shapes, strict=True)
    for size, name in sorted(((-int(np.prod(shape, dtype=object)), name) for name, shape in sizes)):
        rank = loads.index(min(loads))
        found[name] = rank
        loads[rank] += 1 - size
    return found


def ties(given: object) -> dict[str, Any]:
    """Which parameters of a module are the same one, by name: as casting's ``memory_of``."""
    named = getattr(given, "named_parameters", None)
    if not callable(named):
        return {}
    return {name: id(value) for name, value in named(remove_duplicate=False)}


@dataclass(slots=True)
class Gathering:
    """One version of a spread model being made, in each process."""

    processes: Processes
    model: Declared
    view: PublishedView  #: of the model: all tensors, as they are published
    snapshot: Snapshot  #: of the tensors that this process keeps
    place: Place  #: of the version; entered in the first process
    touched: Callable[[], None]
    found: Found = field(default_factory=Found)

    def delta(self, said: Said) -> tuple[Found, int]:
        """Make and commit a delta; what changed in all processes, and bytes of the files."""
        with ExitStack() as stack:
            folder = self._folder(stack)
            files: list[Shards] = []

            def begin() -> None:
                folder.mkdir()
                files.append(stack.enter_context(closing(Shards(folder))))

            self._together(begin)
            advancing = Advancing(self.snapshot, said, folder, self.touched)
            tools, stop = Tools(), threading.Event()

            def take(at: int, source: Checkpoint) -> None:
                with closing(source.reader()) as reader:
                    found, frame = advancing.tensor(at, reader, 0, tools, stop)
                self.found.add(found)
                if frame is not None:
                    frame.put(files[0])

            failed = self._walk(take)

            def finish() -> Found:
                if failed is not None:
                    raise failed
                files[0].finish(said)
                return self.found

            total = Found()
            for one in self._together(finish):
                total.add(one)
            return total, self._commit(lambda parent: _joined_delta(parent, said))

    def full(self, companions: Callable[[Path], None], options: Any) -> int:
        """Make and commit a full version; bytes of its files."""
        with ExitStack() as stack:
            folder = self._folder(stack)

            def take(at: int, source: Checkpoint) -> None:
                self.touched()
                into, dtype = self.snapshot.tensor(at), self.snapshot.table.dtypes[at]
                with closing(source.reader()) as reader:
                    copy_tensor(reader, 0, into, window_of(dtype), None, threading.Event())

            failed = self._walk(take)

            def write() -> None:
                if failed is not None:
                    raise failed
                if len(self.snapshot.table):
                    convert(self.snapshot, folder, config=False, workers=options.workers,
                            memory=options.memory)  # fmt: skip

            self._together(write)

            def join(parent: Path) -> None:
                _joined_full(parent)
                companions(parent)

            return self._commit(join)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """See Processes; an OSError is one of writing the version."""

        def guarded() -> T:
            with write_errors(self.place.out):
                return work()

        return self.processes.together(guarded)

    def _folder(self, stack: ExitStack) -> Path:
        """Where this process writes. Raises OutputError where processes share no directory."""

        def enter() -> str:
            # the name that other processes know it by: a descriptor of ours is none
            return os.path.realpath(stack.enter_context(self.place).path)

        first = self.processes.rank == 0
        parent = self._together(lambda: enter() if first else "")[0]

        def there() -> None:
            if not os.path.isdir(parent):
                raise OutputError(
                    f"process {self.processes.rank} does not see {printable(parent)}",
                    hint="write the stream to a file system that all processes share",
                )

        self._together(there)
        return Path(parent) / f"rank-{self.processes.rank:05d}"

    def _walk(self, take: Callable[[int, Checkpoint], None]) -> BaseException | None:
        """Gather all tensors, one at a time, and ``take`` those that this process keeps.

        Gives the first error: others wait for this process at the next tensor all the same.
        """
        mine = {name: at for at, name in enumerate(self.snapshot.table.names)}
        failed: BaseException | None = None
        for i, name in enumerate(self.view.table.names):
            value = self.model.values[name]
            whole = value.full_tensor() if _spread(value) else value
            if name not in mine or failed is not None:
                continue
            try:
                opened = open_memory({name: whole.detach()}, ".")
                assert opened is not None
                with opened:
                    take(mine[name], PublishedView(opened, [0], [self.view.table.dtypes[i]]))
            except BaseException as error:  # raised when all meet
                failed = error
        return failed

    def _commit(self, join: Callable[[Path], None]) -> int:
        def commit() -> int:
            parent = self.place.path
            join(parent)
            size = sum(entry.stat().st_size for entry in os.scandir(parent) if entry.is_file())
            self.place.commit()
            return size

        first = self.processes.rank == 0
        return self._together(lambda: commit() if first else 0)[0]


def _joined_delta(parent: Path, said: Said) -> None:
    """Give the files of all processes the names that a version's have, and write its index."""
    wanted: list[tuple[Path, list[str]]] = []
    for folder in _folders(parent):
        index = parse_index((folder / INDEX_NAME).read_bytes(), str(folder / INDEX_NAME))
        wanted += _by_file(folder, index.weight_map)
    weight_map: dict[str, str] = {}
    for position, (path, names) in enumerate(wanted):
        name = shard_name(position, len(wanted))
        os.rename(path, parent / name)
        weight_map |= dict.fromkeys(names, name)
    for folder in _folders(parent):
        shutil.rmtree(folder)
    (parent / INDEX_NAME).write_bytes(index_bytes(said, weight_map))


def _joined_full(parent: Path) -> None:
    """The same of a full version, whose files are counted from 1."""
    import json

    wanted: list[tuple[Path, list[str]]] = []
    total = 0
    for folder in _folders(parent):
        with open_local(folder) as part:
            total += int(part.table.nbytes.sum())
            files = [part.files[i].name for i in part.file_index.tolist()]
            wanted += _by_file(folder, dict(zip(part.table.names, files, strict=True)))
    weight_map: dict[str, str] = {}
    for position, (path, names) in enumerate(wanted, 1):
        name = f"model-{position:05d}-of-{len(wanted):05d}.safetensors"
        os.rename(path, parent / name)
        weight_map |= dict.fromkeys(names, name)
    for folder in _folders(parent):
        shutil.rmtree(folder)
    found = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (parent / INDEX_NAME).write_text(json.dumps(found, indent=2) + "\n")


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir())


def _by_file(folder: Path, weight_map: Mapping[str, str]) -> list[tuple[Path, list[str]]]:
    found: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        found.setdefault(file, []).append(name)
    return [(folder / file, found[file]) for file in sorted(found)]


def _state(given: object) -> Mapping[str, Any]:
    state = getattr(given, "state_dict", None)
    content = state() if callable(state) and not isinstance(given, Mapping) else given
    if not isinstance(content, Mapping):
        return {}
    return {name: value for name, value in content.items() if isinstance(name, str)}


def _spread(value: object) -> bool:
    return hasattr(value, "device_mesh") and hasattr(value, "full_tensor")

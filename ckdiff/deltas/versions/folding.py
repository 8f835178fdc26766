"""One tensor through several weight versions: its old bytes in, its new ones out, all digests held.

Nothing is written here. Whoever takes the windows keeps them only when all were taken: a digest is
known at the end of a tensor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ckdiff.deltas.parts import called
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.versions.checksums import Digester, digester
from ckdiff.deltas.versions.decoding import COMMON_WINDOW, Patch, memory_of, patch
from ckdiff.deltas.versions.encoding import WINDOW
from ckdiff.deltas.versions.packed import PACKED_MEMORY, PackedTools
from ckdiff.deltas.versions.reading import Version
from ckdiff.deltas.versions.spool import nameless, read_back
from ckdiff.errors import OutputError
from ckdiff.kernels.memory import Bytes
from ckdiff.outputs.writing import write_all

#: bytes that the decoders of a tensor's versions may need at a time; more versions take turns
DECODERS_MEMORY = 24 << 20
#: bytes of anonymous memory of one thread that folds
FOLD_MEMORY = 2 * WINDOW + DECODERS_MEMORY

#: puts the bytes of a tensor from some byte on into a buffer
Fill = Callable[[int, Bytes], None]


class Buffers:
    """Of one thread."""

    def __init__(self) -> None:
        self.window, self.scratch = np.empty((2, WINDOW), np.uint8)
        self._packed: PackedTools | None = None

    def packed(self) -> PackedTools:
        """What packed versions need; made when it is first asked for."""
        if self._packed is None:
            self._packed = PackedTools()
        return self._packed


def fold_memory(versions: Sequence[Version]) -> int:
    """Bytes of anonymous memory of one thread that folds these."""
    return FOLD_MEMORY + (PACKED_MEMORY if any(v.packed is not None for v in versions) else 0)


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is folded."""

    name: str
    nbytes: int
    window: int  #: bytes that are worked on at a time
    fill: Fill
    versions: Sequence[Version]  #: those that change it, the oldest first


@dataclass(slots=True)
class Folder:
    """Folds tensors; shared by threads, each with its own buffers."""

    folder: Path  #: where tensors lie that are changed by more versions than decoders fit
    hint: str  #: what to do where the first version does not fit what the base holds
    _large: threading.Lock = field(default_factory=threading.Lock)

    def fold(self, tensor: Tensor, buffers: Buffers) -> Iterator[tuple[int, Bytes]]:
        """The tensor after all of its versions, window by window: first byte, and a buffer.

        The buffer may be changed by whoever takes it, and holds until the next one is taken. Raises
        DeltaError where a frame is damaged, or a digest is another; after the last window too.
        """
        steps, fill = list(tensor.versions), tensor.fill
        while True:
            count = self._affordable(tensor, steps)
            if count == len(steps):
                yield from self._through(tensor, fill, steps, buffers)
                return
            with ExitStack() as stack:
                try:
                    fd = nameless(self.folder)
                    stack.callback(os.close, fd)
                    for _, data in self._through(tensor, fill, steps[:count], buffers):
                        write_all(fd, data.data)
                except OSError as error:
                    raise OutputError(
                        f"cannot keep a tensor in a temporary file: {error}"
                    ) from None
                rest = Tensor(
                    tensor.name, tensor.nbytes, tensor.window, partial(read_back, fd), steps[count:]
                )
                yield from self.fold(rest, buffers)
                return

    def _affordable(self, tensor: Tensor, steps: Sequence[Version]) -> int:
        """How many of the versions can be worked on at a time: at least one."""
        used = 0
        if len(steps) == 1:
            return 1
        for i, version in enumerate(steps):
            assert version.said is not None
            if version.packed is not None:
                continue  # all of them work with the same buffers
            used += memory_of(version.said.encoding, version.head(tensor.name, tensor.nbytes))
            if used > DECODERS_MEMORY and i:
                return i
        return len(steps)

    def _through(
        self, tensor: Tensor, fill: Fill, steps: Sequence[Version], buffers: Buffers
    ) -> Iterator[tuple[int, Bytes]]:
        if any(version.packed is not None for version in steps):
            yield from self._through_packed(tensor, fill, steps, buffers)
            return
        with ExitStack() as stack:
            at_work = []
            for version in steps:
                assert version.said is not None
                if len(steps) == 1 and version.head(tensor.name).window > COMMON_WINDOW:
                    stack.enter_context(self._large)
                step = _Step(version, tensor, buffers, self.hint)
                stack.callback(step.close)
                at_work.append(step)
            for start in range(0, tensor.nbytes, tensor.window):
                window = buffers.window[: min(tensor.window, tensor.nbytes - start)]
                fill(start, window)
                for step in at_work:
                    step.apply(window)
                yield start, window
            for step in at_work:
                step.finish()

    def _through_packed(
        self, tensor: Tensor, fill: Fill, steps: Sequence[Version], buffers: Buffers
    ) -> Iterator[tuple[int, Bytes]]:
        """The same where packed versions are among them: these take larger windows at a time."""
        with ExitStack() as stack:
            at_work: list[_Step | _PackedStep] = []
            for version in steps:
                if version.packed is not None:
                    step: _Step | _PackedStep = _PackedStep(version, tensor, buffers, self.hint)
                else:
                    step = _Step(version, tensor, buffers, self.hint)
                    stack.callback(step.close)
                at_work.append(step)
            size = max(step.window for step in at_work)
            for start in range(0, tensor.nbytes, size):
                whole = buffers.packed().window[: min(size, tensor.nbytes - start)]
                parts = range(0, len(whole), tensor.window)
                windows = [whole[part : part + tensor.window] for part in parts]
                for part, window in zip(parts, windows, strict=True):
                    fill(start + part, window)
                for step in at_work:
                    for window in [whole] if step.window else windows:
                        step.apply(window)
                for part, window in zip(parts, windows, strict=True):
                    yield start + part, window
            for step in at_work:
                step.finish()


class _PackedStep:
    """A packed version's change of a tensor; what is wrong is said of the version."""

    def __init__(self, version: Version, tensor: Tensor, buffers: Buffers, hint: str) -> None:
        assert version.packed is not None
        self._said = _Faults(version, tensor.name, hint)
        self._step = version.packed.step(tensor.name, buffers.packed())
        self.window = self._step.window

    def apply(self, window: Bytes) -> None:
        with self._said:
            self._step.apply(window)

    def finish(self) -> None:
        with self._said:
            self._step.finish()


class _Step:
    """One version's change of a tensor, and the digest of what it makes."""

    window = 0  #: it takes windows of any size

    def __init__(self, version: Version, tensor: Tensor, buffers: Buffers, hint: str) -> None:
        assert version.said is not None
        self._version, self._name, self._hint = version, tensor.name, hint
        self._frame = version.frames[tensor.name]
        self._digester: Digester = digester(version.said.checksum)
        self._patch: Patch
        read = version.reader(self._frame)
        with self._said():
            self._patch = patch(version.said.encoding, read, tensor.nbytes, buffers.scratch)

    def apply(self, window: Bytes) -> None:
        with self._said():
            self._patch.apply(window)
        self._digester.update(window)

    def finish(self) -> None:
        with self._said():
            self._patch.finish()
        if self._digester.hexdigest() != self._frame.digest:
            raise self._version.fault(
                f"what it makes of {called(self._name)} has another digest than it says", self._hint
            )

    def close(self) -> None:
        self._patch.close()

    def _said(self) -> _Faults:
        return _Faults(self._version, self._name)


class _Faults:
    """Says of which version and tensor a fault is."""

    def __init__(self, version: Version, name: str, hint: str | None = None) -> None:
        self._version, self._name, self._hint = version, name, hint

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Damaged):
            what = f"{called(self._name)} {error}"
            if self._hint is not None:
                raise self._version.fault(what, self._hint) from None
            raise self._version.fault(what) from None
        if isinstance(error, OSError):
            raise self._version.fault(f"cannot be read: {error.strerror}") from None

"""What several versions do to a tensor together, without the tensor.

Versions are put on backgrounds in its place. What ``xor`` makes of zeros is the exclusive or of all
of them. ``overwrite`` makes the same of two backgrounds that differ everywhere where it writes, and
only there.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ckdiff.deltas.parts import called
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.versions.decoding import Patch, memory_of, patch
from ckdiff.deltas.versions.encoding import WINDOW
from ckdiff.deltas.versions.folding import DECODERS_MEMORY
from ckdiff.deltas.versions.form import XOR
from ckdiff.deltas.versions.places import places
from ckdiff.deltas.versions.reading import Version
from ckdiff.deltas.versions.spool import nameless, read_back
from ckdiff.kernels.memory import Bytes
from ckdiff.outputs.writing import write_all

#: bytes of anonymous memory of a thread that merges: windows, and decoders for both backgrounds
MERGE_MEMORY = 4 * WINDOW + 2 * DECODERS_MEMORY


class Merger:
    """Of one thread. ``folder`` is where tensors lie that more versions change than can be worked
    on at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._buffers = np.empty((4, WINDOW), np.uint8)

    def nbytes(self, tensor: str, steps: Sequence[Version]) -> int:
        """Bytes of the tensor, or of ``overwrite`` those up to the last that is written.

        Raises DeltaError where versions disagree.
        """
        assert steps[0].said is not None
        if steps[0].said.encoding == XOR:
            size = steps[0].head(tensor).content
            for version in steps:
                version.head(tensor, size)
            return size
        return max((int(p[-1]) + 1 for v in steps for p in places(v, tensor)), default=0)

    def merged(
        self, tensor: str, steps: Sequence[Version]
    ) -> Generator[tuple[Bytes, Bytes], None, None]:
        """Windows of two tensors of which the one becomes the other by what ``steps`` do.

        They hold until the next are taken. Raises DeltaError for damaged frames.
        """
        assert steps[0].said is not None
        nbytes, xor = self.nbytes(tensor, steps), steps[0].said.encoding == XOR
        backgrounds = [0] if xor else [0, 0xFF]
        other = self._buffers[2]
        with ExitStack() as stack:
            kept: list[int] = []  # where the backgrounds are after some of the versions
            for batch in _batches(tensor, steps):
                last = batch[-1] is steps[-1]
                through = self._through(tensor, batch, nbytes, backgrounds, kept)
                kept = [] if last else [nameless(self._folder) for _ in backgrounds]
                for fd in kept:
                    stack.callback(os.close, fd)
                for windows in through:
                    if not last:
                        for fd, window in zip(kept, windows, strict=True):
                            write_all(fd, window.data)
                        continue
                    size = len(windows[0])
                    if xor:
                        other[:size] = 0
                        yield other[:size], windows[0]
                    else:
                        written = windows[0] == windows[1]
                        np.copyto(other[:size], windows[0])
                        np.invert(windows[0], out=other[:size], where=written)
                        yield other[:size], windows[0]

    def _through(
        self,
        tensor: str,
        steps: Sequence[Version],
        nbytes: int,
        backgrounds: Sequence[int],
        kept: Sequence[int],
    ) -> Iterator[list[Bytes]]:
        """Windows of the backgrounds after some versions."""
        scratch = self._buffers[3]
        with ExitStack() as stack:
            at_work = [
                [stack.enter_context(_Step(version, tensor, nbytes, scratch)) for version in steps]
                for _ in backgrounds
            ]
            for start in range(0, nbytes, WINDOW):
                size = min(WINDOW, nbytes - start)
                windows = [self._buffers[i][:size] for i in range(len(backgrounds))]
                for i, window in enumerate(windows):
                    if kept:
                        read_back(kept[i], start, window)
                    else:
                        window.fill(backgrounds[i])
                    for step in at_work[i]:
                        step.apply(window)
                yield windows
            for steps_of in at_work:
                for step in steps_of:
                    step.finish()


class _Step:
    """A version's change of the tensor; what is wrong with it is said of the version."""

    def __init__(self, version: Version, tensor: str, nbytes: int, scratch: Bytes) -> None:
        assert version.said is not None
        self._version, self._tensor = version, tensor
        read = version.reader(version.frames[tensor])
        try:
            self._patch: Patch = patch(version.said.encoding, read, nbytes, scratch)
        except (Damaged, OSError) as error:
            raise self._fault(error) from None

    def __enter__(self) -> _Step:
        return self

    def __exit__(self, *exception: object) -> None:
        self._patch.close()

    def apply(self, window: Bytes) -> None:
        try:
            self._patch.apply(window)
        except (Damaged, OSError) as error:
            raise self._fault(error) from None

    def finish(self) -> None:
        try:
            self._patch.finish()
        except (Damaged, OSError) as error:
            raise self._fault(error) from None

    def _fault(self, error: Damaged | OSError) -> Exception:
        if isinstance(error, OSError):
            return self._version.fault(f"cannot be read: {error.strerror}")
        return self._version.fault(f"{called(self._tensor)} {error}")


def _batches(tensor: str, steps: Sequence[Version]) -> Iterator[list[Version]]:
    """Runs of versions whose decoders fit into memory together."""
    batch: list[Version] = []
    used = 0
    for version in steps:
        assert version.said is not None
        needed = memory_of(version.said.encoding, version.head(tensor))
        if batch and used + needed > DECODERS_MEMORY:
            yield batch
            batch, used = [], 0
        batch.append(version)
        used += needed
    yield batch

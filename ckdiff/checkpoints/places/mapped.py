"""Reading local files through memory mappings, a window at a time.

The whole file is mapped (address space costs nothing); a window is populated before a kernel may
touch it, so that a file that was cut is an error and not a signal. Its pages are dropped from our
resident set behind it, those of some windows at a time. After each window the files are asked
whether they are still the files that were opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.errors import CheckpointError, printable
from ckdiff.kernels import guard
from ckdiff.kernels.advising import advise

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_PAGE = mmap.PAGESIZE
#: populating faster than this (bytes a second) came from the page cache, not from a disk
_WARM = 4e9
#: bytes behind a reader's windows that stay mapped: whenever pages are dropped the other cores are
#: interrupted
_BEHIND = 1 << 25

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


#: what file systems answer that do not map files: some of FUSE, some over a network
_REFUSALS = {errno.ENODEV, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


_Range = tuple[int, int, int]  # file, first byte, byte after the last one


class Mappings:
    """The mappings of a checkpoint's files, made when first needed, shared by its readers."""

    def __init__(self, files: Sequence[OpenFile]) -> None:
        self.files = files
        #: whether the disk is asked ahead of time, until a window proves otherwise; readers come
        #: and go with chunks, and find what the last one saw
        self.cold = True
        self._addresses: list[int] = [0] * len(files)
        self._lock = threading.Lock()
        self._refusal = 0  #: the errno of the last file that was not mapped

    def refused(self) -> bool:
        """Whether the file system of some file does not map files at all."""
        return any(self._refuses(index) for index in range(len(self.files)))

    def _refuses(self, index: int) -> bool:
        if self._addresses[index] or not self.files[index].size:
            return False
        self._refusal = 0
        with contextlib.suppress(CheckpointError):
            self._map(index)
        return self._refusal in _REFUSALS

    def address(self, index: int) -> int:
        """Where file ``index`` is mapped."""
        found = self._addresses[index]
        return found if found else self._map(index)

    def _map(self, index: int) -> int:
        with self._lock:
            if self._addresses[index]:
                return self._addresses[index]
            file = self.files[index]
            address = _libc.mmap(None, file.size, mmap.PROT_READ, mmap.MAP_SHARED, file.fd, 0)
            if address is None or address == ctypes.c_void_p(-1).value:
                code = ctypes.get_errno()
                self._refusal = code
                raise CheckpointError(
                    f"cannot map {printable(file.path)}: {os.strerror(code)}",
                    hint="is the address space limited (ulimit -v)?",
                )
            guard.watch(address, file.size)
            self._addresses[index] = int(address)
            return int(address)

    def close(self) -> None:
        """Unmap everything; no reader may be used any more."""
        with self._lock:
            for index, address in enumerate(self._addresses):
                if address:
                    guard.forget(address)
                    _libc.munmap(address, self.files[index].size)
                    self._addresses[index] = 0


class MappedReader:
    """A SpanReader whose tensors are local files; one for each worker.

    From the first window until it is closed the SIGBUS guard is in place.
    """

    def __init__(self, maps: Mappings) -> None:
        self._maps = maps
        self._held: list[_Range] = []
        self._behind: list[_Range] = []  # released, and still mapped
        self._left = _BEHIND  # bytes that may be so besides
        self._guarded = False

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader. The addresses lie inside the mappings; nothing is copied."""
        if not self._guarded:
            guard.install()
            self._guarded = True
        ranges, addresses = self._ranges(tensors, starts, nbytes)
        self._held = ranges
        began = time.perf_counter()
        total = sum(stop - start for _, start, stop in ranges)
        self._advise(ranges, _POPULATE_READ, self._populate)
        self._maps.cold = total < _WARM * (time.perf_counter() - began)
        return addresses

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """Ask the kernel to start reading; skipped while the page cache has everything."""
        if not self._maps.cold:
            return
        self._advise(self._ranges(tensors, starts, nbytes)[0], mmap.MADV_WILLNEED)

    def release(self) -> None:
        """See SpanReader."""
        files = self._drop()
        for index in files:
            file = self._maps.files[index]
            file.check()
            if guard.faults(self._maps.address(index)):  # zeros were read, whatever the reason
                raise CheckpointError(
                    f"cannot read {printable(file.path)}: some of its pages could not be read",
                    hint="the disk or network file system failed; check its logs",
                )

    def close(self) -> None:
        """See SpanReader."""
        self._left = 0
        self._drop()
        if self._guarded:
            self._guarded = False
            guard.remove()

    def _drop(self) -> set[int]:
        held, self._held = self._held, []
        self._behind += held
        self._left -= sum(stop - start for _, start, stop in held)
        if self._left <= 0:
            self._advise(_merged(self._behind), mmap.MADV_DONTNEED)
            self._behind, self._left = [], _BEHIND
        return {index for index, _, _ in held}

    def _advise(
        self,
        ranges: list[_Range],
        advice: int,
        refused: Callable[[int, int, int], None] = lambda *_: None,
    ) -> None:
        """Advise the system about ranges; each that it refuses is ``refused``."""
        begins = [(self._maps.address(i) + start, stop - start) for i, start, stop in ranges]
        table = np.array(begins, np.int64).reshape(-1, 2)
        done = advise(table, advice)
        while done < len(ranges):
            refused(*ranges[done])
            done += 1 + advise(table[done + 1 :], advice)

    def _populate(self, index: int, start: int, stop: int) -> None:
        """The same once more for a range, until it is there or it is known why it is not."""
        address = self._maps.address(index) + start
        while _libc.madvise(address, stop - start, _POPULATE_READ) != 0:
            code = ctypes.get_errno()
            if code in (errno.EINTR, errno.EAGAIN):
                continue
            if code == errno.EINVAL:  # an older kernel: the guard is the protection
                return
            file = self._maps.files[index]
            file.check()  # cut while mapped: SourceChanged says so
            raise CheckpointError(
                f"cannot read {printable(file.path)} at bytes {start}-{stop}: {os.strerror(code)}",
                hint="the disk or network file system failed; check its logs",
            )

    def _ranges(
        self, tensors: IntArray, starts: IntArray, nbytes: IntArray
    ) -> tuple[list[_Range], IntArray]:
        """Whole-page ranges, merged where they touch; and the addresses."""
        addresses = np.empty(len(tensors), np.int64)
        pieces: list[_Range] = []
        for i, (index, begin, size) in enumerate(
            zip(tensors.tolist(), starts.tolist(), nbytes.tolist(), strict=True)
        ):
            addresses[i] = self._maps.address(index) + begin
            if size:
                pieces.append((index, begin // _PAGE * _PAGE, -(-(begin + size) // _PAGE) * _PAGE))
        return _merged(pieces), addresses


def _merged(pieces: list[_Range]) -> list[_Range]:
    pieces.sort()
    merged: list[_Range] = []
    for index, start, stop in pieces:
        if merged and merged[-1][0] == index and start <= merged[-1][2]:
            merged[-1] = (index, merged[-1][1], max(stop, merged[-1][2]))
        else:
            merged.append((index, start, stop))
    return merged

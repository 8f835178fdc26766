"""Machine code as a flat image: made once from an object file, put into memory without a linker.

A kernel refers to nothing but its own constants, so all that loading has to do is to add the
address of the image to a few words in it. That takes microseconds, where importing numba and LLVM
to do the same takes a third of a second, and a whole second from a cold disk.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from dataclasses import dataclass
from itertools import accumulate

_ALIGN = 64  # of sections: what a 512-bit constant may ask for
_HEAD = struct.Struct("<4Q")  # entry, bytes of code, bytes of all, number of fixups
_FIXUP = struct.Struct("<2Q")  # offset of the word, what to add to the image's address

_X86_64 = 62
_RELA = 4  # section type
_WRITE, _ALLOCATE = 1, 2  # section flags
_UNWIND = 0x70000001  # section type of .eh_frame: kernels do not throw
_R_64, _R_PC32, _R_PLT32, _R_PC64 = 1, 2, 4, 24


@dataclass(slots=True)
class _Section:
    kind: int
    flags: int
    content: bytes
    size: int
    link: int
    target: int
    align: int
    place: int = -1  #: in the image


def build(object_code: bytes, symbol: str) -> bytes:
    """The image of an ELF object file for x86-64 whose entry is ``symbol``.

    Raises ValueError for an object file with something that only a real linker can place.
    """
    try:
        return _build(object_code, symbol)
    except (struct.error, IndexError) as error:
        raise ValueError(f"not a complete object file: {error}") from None


def _build(data: bytes, entry_name: str) -> bytes:
    if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 18)[0] != _X86_64:
        raise ValueError("not an object file for x86-64")
    sections = _sections(data)
    code = [
        s for s in sections if s.flags & (_ALLOCATE | _WRITE) == _ALLOCATE and s.kind != _UNWIND
    ]
    variables = [s for s in sections if s.flags & _WRITE]
    code_size = _place(code, 0)
    start = -(-code_size // mmap.PAGESIZE) * mmap.PAGESIZE  # what may be written has its own pages
    total = _place(variables, start) if variables else start
    image = bytearray(total)
    for section in (*code, *variables):
        image[section.place : section.place + len(section.content)] = section.content
    fixups: list[tuple[int, int]] = []
    entry = -1
    for table in sections:
        if table.kind == 2:  # symbols
            entry = max(entry, _find(sections, table, entry_name))
        elif table.kind == _RELA and sections[table.target].place >= 0:
            _relocate(sections, table, image, fixups)
    if entry < 0:
        raise ValueError(f"no symbol {entry_name}")
    head = _HEAD.pack(entry, start, total, len(fixups))
    return head + b"".join(_FIXUP.pack(*fixup) for fixup in fixups) + bytes(image)


def _sections(data: bytes) -> list[_Section]:
    (at,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<2H", data, 58)
    sections = []
    for i in range(count):
        _, kind, flags, _, offset, length, link, target, align, _ = struct.unpack_from(
            "<2I4Q2I2Q", data, at + i * size
        )
        content = b"" if kind == 8 else data[offset : offset + length]  # 8: all zeros, no bytes
        sections.append(_Section(kind, flags, content, length, link, target, align))
    return sections


def _place(sections: list[_Section], start: int) -> int:
    """Give each section its place from ``start`` on; the end of the last one."""
    if any(s.align > _ALIGN for s in sections):
        raise ValueError("a section wants a larger alignment")
    ends = list(accumulate((-(-s.size // _ALIGN) * _ALIGN for s in sections), initial=start))
    for section, place in zip(sections, ends, strict=False):
        section.place = place
    return ends[-1]


def _symbol(sections: list[_Section], table: _Section, index: int) -> tuple[str, int]:
    """(name, place in the image) of a symbol; the place is -1 where it is not in the image."""
    name, _, _, where, value, _ = struct.unpack_from("<I2BH2Q", table.content, 24 * index)
    names = sections[table.link].content
    text = names[name : names.index(b"\0", name)].decode("utf-8", "replace")
    inside = 0 < where < len(sections) and sections[where].place >= 0
    return text, sections[where].place + value if inside else -1


def _find(sections: list[_Section], table: _Section, wanted: str) -> int:
    for index in range(len(table.content) // 24):
        name, place = _symbol(sections, table, index)
        if name == wanted:
            return place
    return -1


def _relocate(
    sections: list[_Section], table: _Section, image: bytearray, fixups: list[tuple[int, int]]
) -> None:
    for offset, info, addend in struct.iter_unpack("<2Qq", table.content):
        kind, index = info & 0xFFFFFFFF, info >> 32
        name, place = _symbol(sections, sections[table.link], index)
        if place < 0:
            raise ValueError(f"refers to {name or 'something'} outside of it")
        at = sections[table.target].place + offset
        if kind == _R_64:
            fixups.append((at, place + addend))
        elif kind in (_R_PC32, _R_PLT32):
            struct.pack_into("<i", image, at, place + addend - at)
        elif kind == _R_PC64:
            struct.pack_into("<q", image, at, place + addend - at)
        else:
            raise ValueError(f"has a relocation of type {kind}")


_kept: list[mmap.mmap] = []  # code is never unmapped: a signal handler may still point to it


def load(image: bytes) -> int:
    """Put an image into executable memory; the address of its entry.

    Raises ValueError for what is no image, and OSError where memory cannot be made executable.
    """
    try:
        entry, code, total, count = map(int, _HEAD.unpack_from(image))
        fixups = _HEAD.size + _FIXUP.size * count
        if len(image) != fixups + total or not 0 <= entry < code <= total:
            raise ValueError("sizes do not agree")
        memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory[:] = image[fixups:]
        for at, addend in _FIXUP.iter_unpack(image[_HEAD.size : fixups]):
            struct.pack_into("<Q", memory, at, address + addend)
    except struct.error as error:
        raise ValueError(str(error)) from None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.mprotect(address, code, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        raise OSError(ctypes.get_errno(), "memory cannot be made executable")
    _kept.append(memory)
    return address + entry

"""What a file is, by its first bytes, and what its header says without being parsed."""

from __future__ import annotations

import posixpath

from ckdiff.checkpoints.folders import Folder, where
from ckdiff.checkpoints.formats.safetensors import HEADER_LIMIT, header_from
from ckdiff.errors import CheckpointError

SHARDING = "DCP_SHARDING_INFO"  #: in the metadata of a file of pieces
_FIRST = 1 << 16  # bytes in which a header's metadata nearly always ends
_BLANKS = b" \t\n\r"
#: suffixes of files that may be torch files by another name
_MAYBE = ("", ".tar", ".pkl", ".th", ".torch", ".weights", ".params", ".model", ".dat")
_USTAR = (b"ustar", 257)


def file_format(folder: Folder, name: str) -> str:
    """``safetensors`` or ``torch``, by the first bytes of a file. Raises CheckpointError.

    What is neither is called safetensors: its reader says what is wrong with it.
    """
    head = folder.head(name, 512)
    if _begins_like_safetensors(head):
        return "safetensors"
    return "torch" if _torch(head) else "safetensors"


def is_weights(folder: Folder, name: str) -> bool:
    """Whether a file begins like safetensors or like a zip of torch, whatever it is called."""
    return _begins_like_safetensors(folder.head(name, 512)) or is_torch(folder, name, archive=True)


def is_torch(folder: Folder, name: str, *, archive: bool = False) -> bool:
    """Whether a file begins like what ``torch.save`` writes, or wrote once.

    With ``archive`` only a zip counts that begins with what torch puts first.
    """
    head = folder.head(name, 512)
    if archive:
        length = int.from_bytes(head[26:28], "little")
        first = head[30 : 30 + length]
        return head[:4] == b"PK\x03\x04" and first.endswith((b"/data.pkl", b"/version"))
    return not _begins_like_safetensors(head) and _torch(head)


def looks_torch(name: str) -> bool:
    """Whether a file of this name may be a torch file although it is not called like one."""
    return posixpath.splitext(name)[1] in _MAYBE


def has_pieces(folder: Folder, name: str) -> bool:
    """Whether a safetensors file holds pieces of tensors: its metadata has their offsets.

    A header that is broken has none; whoever opens the file says so. Raises CheckpointError.
    """
    word = SHARDING.encode()
    first = folder.head(name, _FIRST)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > HEADER_LIMIT:
        return False
    if word not in first:
        if length + 8 <= len(first) or _metadata_ended(first):
            return False
        first = folder.head(name, 8 + length)
        if word not in first:
            return False
    if len(first) < 8 + length:
        first = folder.head(name, 8 + length)
    try:
        header = header_from(
            lambda offset, nbytes: first[offset : offset + nbytes],
            folder.size(name),
            where(folder, name),
        )
    except CheckpointError:
        return False
    return SHARDING in header.metadata


def _metadata_ended(first: bytes) -> bool:
    """Whether a header begins with metadata that are short and simple, and ended by here."""
    start = first[8:].lstrip(_BLANKS)
    if not start.startswith(b'{"__metadata__":{'):
        return False
    inner = start[: start.find(b"}") + 1]
    return b"}" in inner and b"\\" not in inner and inner.count(b'"') % 2 == 0


def _begins_like_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and length <= HEADER_LIMIT and head[8:].lstrip(_BLANKS)[:1] == b"{"


def _torch(head: bytes) -> bool:
    pickle = head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 2
    mark, at = _USTAR
    return head[:4] == b"PK\x03\x04" or pickle or head[at : at + len(mark)] == mark

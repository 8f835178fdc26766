"""What is given as a torch file and is none of today: what it is, and what to do about it."""

from __future__ import annotations

from ckdiff.checkpoints.formats.lookalikes import guess
from ckdiff.errors import CheckpointError

#: the number with which torch 1.5 and older begin: 0x1950a86a20f9469cfc6c, pickled by itself
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_PLAIN = "m = torch.load(FILE, weights_only=True); torch.save(m, FILE)"
_OLD = f"save it again with torch: {_PLAIN}"


def refusal(head: bytes, where: str) -> CheckpointError:
    """The error for a file that is no zip; ``head`` are its first bytes, 1024 if it has them."""
    what, advice = _what(head)
    return CheckpointError(f"{where}: cannot be read as a torch file: {what}", hint=advice)


def _what(head: bytes) -> tuple[str, str]:
    if _MAGIC in head[:20]:
        return "it has the format of torch before 1.6", _OLD
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return "it is a tar archive, as torch before 0.1.10 wrote, or as models are packed", (
            f"unpack it, or {_OLD}"
        )
    if head[:2] == b"\x1f\x8b":
        return "it is packed with gzip", "unpack it with gunzip"
    if head[:6] == b"\xfd7zXZ\0" or head[:3] == b"BZh" or head[:4] == b"\x28\xb5\x2f\xfd":
        return "it is compressed", "unpack it"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "it holds safetensors", "give it a name that ends in .safetensors"
    if head[:1] == b"\x80" or head[-1:] == b".":
        return "it is a pickle by itself", f"ckdiff reads only what torch.save writes: {_OLD}"
    if not head:
        return "it is empty", "fetch it again"
    found = guess(head)
    if found is None:
        return "nothing in it says what it is", "is the file whole? fetch it again"
    return f"it looks like {found[0]}", found[1]


def _is_old_tar(head: bytes) -> bool:
    """Whether the first 512 bytes are those of a file in a tar without a magic word."""
    if len(head) < 512 or not head[0]:
        return False
    digits = head[148:156].strip(b" \0")
    if not digits or any(digit not in b"01234567" for digit in digits):
        return False
    blank = head[:148] + b" " * 8 + head[156:512]
    return int(digits, 8) == sum(blank)

"""What a file that is not safetensors probably is, judged by its first bytes; only for hints."""

from __future__ import annotations

_NEVER_UNPICKLED = (
    "ckdiff never unpickles; it reads torch files, but not as shards of a safetensors checkpoint"
)
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    *((bytes([0x80, n]), "a pickle such as torch.save writes", _NEVER_UNPICKLED) for n in range(6)),
    (b"PK\x03\x04", "a zip archive such as torch.save writes", _NEVER_UNPICKLED),
    (b"GGUF", "a GGUF file", "compare the safetensors files that it was made from"),
    (b"\x93NUMPY", "a numpy array", "in Python give ckdiff.diff the arrays by their names"),
    (b"\x1f\x8b", "a gzip file", "unpack it, and give what was in it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it, and give what was in it"),
    (b"\x89HDF", "an HDF5 file", "save the model as safetensors"),
    (b"version ", "a Git LFS pointer", "fetch the real file with git lfs pull"),
    (b"\xef\xbb\xbf", "text with a byte order mark", "give a safetensors file"),
    (b"<", "an HTML or XML page", "the download failed; fetch the file again"),
    (b"{", "a JSON file", "give the safetensors file or its directory"),
)


def guess(head: bytes) -> tuple[str, str] | None:
    """What a file beginning with ``head`` looks like and what to do about it, or None.

    A good safetensors file may begin with any of these bytes, so this must only be asked about a
    file that has already been refused.
    """
    for magic, what, advice in _KINDS:
        if head.startswith(magic):
            return what, advice
    return None

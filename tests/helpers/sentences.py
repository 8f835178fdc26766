"""The sentences of a page, as a reader meets them: without code, tables and links' addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator

_FENCE = re.compile(r"^(```|~~~|:::).*?^\1[^\n]*$", re.S | re.M)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_CODE = re.compile(r"`[^`]*`")
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+", re.M)
_END = re.compile(r"(?<=[.!?:;])[\"')*]*\s+")
_WORD = re.compile(r"[\w'’/.,%+×·−-]*\w[\w'’/.,%+×·−-]*")


def paragraphs(text: str) -> Iterator[str]:
    """Running text: items of lists are paragraphs of their own; headings, tables and formulas are
    not.
    """
    text = _FENCE.sub("\n\n", text)
    text = _ITEM.sub("\n\n", text)
    for block in re.split(r"\n\s*\n", text):
        written = block.strip("\n").splitlines()
        if all(line.startswith("    ") for line in written):  # code, or a formula
            continue
        lines = [line.strip() for line in written]
        lines = [line for line in lines if not line.startswith(("|", "#", ">", "<"))]
        if lines:
            yield " ".join(lines)


def sentences(text: str) -> Iterator[str]:
    """Sentences; what follows a colon or a semicolon is read as one of its own."""
    for paragraph in paragraphs(text):
        plain = _CODE.sub("code", _LINK.sub(r"\1", paragraph))
        yield from (part for part in _END.split(plain) if _WORD.search(part))


def words(sentence: str) -> int:
    """How many words a sentence has; code counts as one."""
    return len(_WORD.findall(sentence))

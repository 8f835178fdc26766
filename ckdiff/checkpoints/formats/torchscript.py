"""TorchScript archives: which attributes of a module are parameters and buffers.

All attributes lie side by side in the pickle. The code beside it, which is never run, says of each
class which of them ``state_dict()`` has; where it does not, all that are tensors count.
"""

from __future__ import annotations

import re
from typing import Any

from ckdiff.checkpoints.formats.pickledvalues import Record, Tensor, walk
from ckdiff.checkpoints.formats.ziparchive import Archive

_LONGEST_CODE = 1 << 22  # bytes of a file of code that is looked through
_ALL_CODE = 1 << 24  # and of all of them
_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[([^\]\n]*)\]\n  __buffers__ = \[([^\]\n]*)\]\n",
    re.MULTILINE,
)
_NAME = re.compile(r'"([^"\\]+)"')

_Classes = dict[str, set[str]]


def keep_state(archive: Archive, prefix: str, content: Any) -> None:
    """Take from the modules of ``content`` the tensors that are neither parameters nor buffers.

    Raises CheckpointError where a file of code is damaged.
    """
    known: dict[str, _Classes] = {}
    left = _ALL_CODE
    for value in walk(content):
        if type(value) is not Record or type(value.state) is not dict:
            continue
        module = value.what.module
        if not module.startswith("__torch__"):
            continue
        if module not in known:
            name = f"{prefix}/code/{module.replace('.', '/')}.py"
            member = archive.members.get(name)
            known[module] = {}
            if member is not None and member.size <= min(left, _LONGEST_CODE):
                left -= member.size
                known[module] = _classes(archive.whole(member))
        names = known[module].get(value.what.qualname)
        if names is not None:
            value.state = {
                key: inner
                for key, inner in value.state.items()
                if type(inner) is not Tensor or key in names
            }


def _classes(code: bytes) -> _Classes:
    """The names of parameters and buffers of each class in a file of code."""
    text = code.decode("utf-8", "replace")
    return {
        match[1]: set(_NAME.findall(match[2])) | set(_NAME.findall(match[3]))
        for match in _CLASS.finditer(text)
    }

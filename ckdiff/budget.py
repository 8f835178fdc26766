"""Sizes as people write them, and how much memory there is; see also ckdiff.running.memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ckdiff.errors import UsageError

MIB = 1 << 20
_SIZE = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>[a-z]*)", re.ASCII)
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power, _letter: 1024**_power}


def parse_size(text: str | int) -> int:
    """``"2GiB"``, ``"512M"``, ``"1.5GB"`` or a number -> bytes; raises UsageError."""
    if not isinstance(text, (str, int)) or isinstance(text, bool):
        raise UsageError(f"a size is a text or a whole number of bytes, not {text!r}")
    if isinstance(text, int):
        if text <= 0:
            raise UsageError(f"a size must be positive, not {text}")
        return text
    match = _SIZE.fullmatch(str(text).strip().lower())
    if match is None or match["unit"] not in _UNITS:
        raise UsageError(f"cannot read the size {text!r}", hint="write it like 512MiB or 2GB")
    size = int(float(match["number"]) * _UNITS[match["unit"]])
    if size <= 0:
        raise UsageError(f"a size must be positive, not {text!r}")
    return size


def format_size(size: float) -> str:
    """Bytes for people: ``8.8 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def default_memory(workers: int) -> int:
    """256 MiB and 32 more for each worker past two, or half of a smaller cgroup limit."""
    wanted = (256 + 32 * max(0, workers - 2)) * MIB
    limit = cgroup_limit()
    return wanted if limit is None else min(wanted, limit // 2)


def cgroup_limit() -> int | None:
    """The tightest memory limit of the cgroups this process is in (v1 and v2), in bytes."""
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                text = "max"
            if text.isdigit():
                limits.append(int(text))
            if folder == root:
                break
    return min(limits, default=None)


def resident_anonymous() -> int:
    """RssAnon of this process in bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def usable_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

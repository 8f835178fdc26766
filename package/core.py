"""The small install: python package/core.py WHEEL -o FOLDER makes ckdiff-core of a wheel of ckdiff.

The same package, byte for byte, that needs only what applying, checking and reading take: machine
code comes along, so that no compiler is needed where it fits the processor.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import sys
import zipfile
from pathlib import Path

#: what it needs everywhere, of what ckdiff needs
NEEDED = ("click", "google-crc32c", "numpy", "rich", "xxhash", "zstandard")
#: what makes machine code where none came along
COMPILER = ("llvmlite", "numba")
_COMES_WITH_NONE = "sys_platform != 'linux' or platform_machine != 'x86_64'"
IMAGES = "ckdiff/kernels/images/"
_README = """# ckdiff-core

ckdiff for machines that only receive weights: `ckdiff apply`, `check`, `info` and in-place sync, in
less than a third of the space. It is the package `ckdiff` with fewer dependencies; `pip install
'ckdiff-core[full]'` adds the others. An environment holds either `ckdiff` or `ckdiff-core`.
"""


def make(wheel: Path, folder: Path) -> Path:
    """Write the wheel of ckdiff-core; gives its path. The same wheel gives the same bytes.

    Raises ValueError for a wheel without machine code: where that is missing, nothing would work.
    """
    _, version, tags = wheel.name.split("-", 2)
    former, latter = f"ckdiff-{version}.dist-info/", f"ckdiff_core-{version}.dist-info/"
    made = folder / f"ckdiff_core-{version}-{tags}"
    record = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(made, "w") as target:
        if not any(name.startswith(IMAGES) for name in source.namelist()):
            raise ValueError(f"{wheel} has no machine code in {IMAGES}")
        for old in source.infolist():
            content = source.read(old)
            name = old.filename.replace(former, latter)
            if name == f"{latter}METADATA":
                content = metadata(content.decode()).encode()
            elif name == f"{latter}RECORD":
                continue
            new = _entry(name, old)
            target.writestr(new, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
            record.append(f"{name},sha256={digest.decode().rstrip('=')},{len(content)}\n")
        listed = _entry(f"{latter}RECORD", source.infolist()[-1])
        target.writestr(listed, "".join([*record, f"{latter}RECORD,,\n"]))
    return made


def metadata(text: str) -> str:
    """The metadata of ckdiff-core, of ckdiff's: its name, what it needs, and its readme."""
    head = text.partition("\n\n")[0]
    lines, rest = [], []
    for line in head.splitlines():
        key, _, value = line.partition(": ")
        if key == "Name":
            line = "Name: ckdiff-core"
        elif key == "Requires-Dist" and ";" not in value:
            name = re.split(r"[<>=!~\[ ]", value)[0]
            if name not in NEEDED:
                rest.append(f"Requires-Dist: {value}; extra == 'full'")
                line = f"Requires-Dist: {value}; {_COMES_WITH_NONE}" if name in COMPILER else ""
        if line:
            lines.append(line)
    lines += ["Provides-Extra: full", *rest]
    return "\n".join(lines) + "\n\n" + _README


def _entry(name: str, like: zipfile.ZipInfo) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, like.date_time)
    entry.external_attr, entry.compress_type = like.external_attr, zipfile.ZIP_DEFLATED
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("dist"))
    given = parser.parse_args()
    try:
        print(make(given.wheel, given.out))
    except ValueError as error:
        sys.exit(f"core.py: {error}")


if __name__ == "__main__":
    main()

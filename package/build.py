"""Build what is published: python package/build.py [-o FOLDER].

An sdist, a wheel of ckdiff with machine code for common processors, and of that wheel the small
one, ckdiff-core. A commit gives the same bytes wherever it is built: the times in the files are the
commit's, and what makes them is pinned in constraints.txt, as it runs where the tests do. The
machine code of all levels takes some minutes; --no-images leaves it and ckdiff-core out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import core

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / core.IMAGES


def levels() -> list[str]:
    """All levels of processors there is machine code for."""
    sys.path.insert(0, str(ROOT))
    from ckdiff.kernels import shipped

    return [level.name for level in shipped.LEVELS]


def images(chosen: list[str], kernels: list[str]) -> None:
    """Make the archives of machine code, two at a time."""
    IMAGES.mkdir()

    def one(level: str) -> None:
        command = [sys.executable, str(ROOT / "package/images.py"), level, str(IMAGES / level)]
        subprocess.run([*command, *kernels], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, chosen))


def date() -> dict[str, str]:
    """The time that is written into files, for the environment: the commit's, if it is one."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or an sdist
        return {}
    return {"SOURCE_DATE_EPOCH": said}


def build(out: Path) -> None:
    """Write the sdist and the wheel into a folder."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel"]
    surroundings = date() | dict(os.environ)
    subprocess.run([*command, "-o", str(out), str(ROOT)], check=True, env=surroundings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--no-images", action="store_true", help="no machine code, no ckdiff-core")
    parser.add_argument("--level", action="append", help="only for this level (repeatable)")
    parser.add_argument("--kernel", action="append", help="only this kernel (repeatable)")
    given = parser.parse_args()
    shutil.rmtree(IMAGES, ignore_errors=True)  # of other sources
    if not given.no_images:
        images(given.level or levels(), given.kernel or [])
    build(given.out)
    if not given.no_images:
        (wheel,) = given.out.glob("ckdiff-*.whl")
        print(core.make(wheel, given.out))


if __name__ == "__main__":
    main()

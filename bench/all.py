"""Measures the page of figures again: every table on it is what a program here printed.

    python bench/all.py [--page docs/performance.md] [--write] [--only PROGRAM ...] [--quick]

What stands between ``<!-- bench/PROGRAM.py OPTIONS -->`` and ``<!-- end -->`` is replaced by what
that command prints, and between ``<!-- machine -->`` and the same by the machine's name. The page
is printed, or with --write put into its place, after each program: what is measured stays when the
rest is stopped. With --only each table gets the machine's name, as the rest of the page may be of
another. A program that fails, or that has nothing to measure here (there is no GPU), leaves what
stood there. What takes how long is said on stderr. It needs 50 GiB of disk, in TMPDIR; --quick is a
smoke test of two minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from common import machine

HERE = Path(__file__).parent
PART = re.compile(r"(<!-- (machine|bench/\w+\.py)(| [^>]*) -->\n).*?(?=<!-- end -->)", re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs/performance.md")
    parser.add_argument("--write", action="store_true", help="put the page into its place")
    parser.add_argument("--only", nargs="+", help="names of programs, such as diff")
    parser.add_argument("--quick", action="store_true", help="small and once: figures mean nothing")
    a = parser.parse_args()
    failed, tried = list[str](), set[str]()

    def measured(part: re.Match[str]) -> str:
        mark, program, options = part[1], part[2], shlex.split(part[3])
        if program == "machine":
            return part[0] if a.only else f"{mark}{machine()}\n"
        if (a.only and Path(program).stem not in a.only) or (a.quick and program in tried):
            return part[0]
        tried.add(program)
        began = time.perf_counter()
        command = [sys.executable, str(HERE.parent / program), *(["--quick"] * a.quick or options)]
        environment = os.environ if a.only else {**os.environ, "CKDIFF_BENCH_PAGE": "1"}
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if run.returncode:
            failed.append(program)
        print(f"{program}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        there = not run.returncode and "|---|" in run.stdout
        return f"{mark}\n{run.stdout.strip()}\n\n" if there else part[0]

    began = time.perf_counter()
    page, at = a.page.read_text("utf-8"), 0
    while part := PART.search(page, at):
        new = measured(part)
        page, at = page[: part.start()] + new + page[part.end() :], part.start() + len(new)
        if a.write:
            a.page.write_text(page, "utf-8")
    print(f"all of it: {(time.perf_counter() - began) / 60:.0f} min", file=sys.stderr)
    if not a.write:
        print(page)
    if failed:
        raise SystemExit(f"failed, and left as they were: {', '.join(failed)}")


if __name__ == "__main__":
    main()

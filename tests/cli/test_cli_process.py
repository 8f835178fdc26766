"""The command as a process: start-up time, signals, pipes that close."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_support import MAIN, PACKAGE, Pair, interrupted, ok, python, write_pair

import ckdiff
from ckdiff.cli import exits
from ckdiff.cli.progress import Reporter

HEAVY = {"numba", "llvmlite", "zarr", "dask", "numpy", "rich", "torch", "huggingface_hub"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def store(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of their difference, with two masks and statistics."""
    path = str(tmp_path_factory.mktemp("store") / "run.zarr")
    ckdiff.diff(*pair, path, rules=["exact", "atol=1e-5"], stats=True)
    return path


# start-up


def test_nothing_heavy_is_imported_at_start_up() -> None:
    code = """
import sys
from ckdiff.cli import main
try:
    main(["--help"])
except SystemExit as done:
    print("MODULES", done.code, *sys.modules)
"""
    words = python(code).stdout.partition("MODULES ")[2].split()
    assert words[0] == "0"
    assert "click" in words
    assert not HEAVY & {word.partition(".")[0] for word in words}


def test_help_answers_at_once() -> None:
    took = []
    while min(took, default=1) >= 0.15 and len(took) < 20:  # other tests run at the same time
        began = time.perf_counter()
        assert python(MAIN, "--help").returncode == 0
        took.append(time.perf_counter() - began)
    assert min(took) < 0.15


def test_module_runs() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-m", "ckdiff", "--version"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == f"ckdiff {ckdiff.__version__}\n"


# signals


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, "interrupted (the same command resumes)"),
        (signal.SIGTERM, 143, "stopped by SIGTERM (the same command resumes)"),
    ],
)
def test_signals_stop_cleanly(
    pair: Pair, tmp_path: Path, number: signal.Signals, code: int, says: str
) -> None:
    out = tmp_path / "out.zarr"
    stopped = interrupted(pair, out, number)
    assert stopped.returncode == code, stopped.stderr
    assert stopped.stdout == ""
    assert stopped.stderr.splitlines()[-1] == f"ckdiff: error: {says}"
    assert not out.exists()
    assert "resuming: 1 of 1" in ok("diff", *pair, "-o", str(out)).stderr
    ok("check", str(out))


def test_the_speed_of_a_resumed_run_is_its_own(pair: Pair, tmp_path: Path) -> None:
    for as_json in (False, True):
        out = tmp_path / f"{as_json}.zarr"
        interrupted(pair, out, signal.SIGINT)
        if as_json:
            found = json.loads(ok("diff", *pair, "-o", str(out), "--json").stdout)
            assert found["bytes_read"] == found["bytes_resumed"] == 81_920
        else:
            assert re.search(
                r"^read nothing, in .* s; 80\.0 KiB were read by the run that was stopped$",
                ok("diff", *pair, "-o", str(out)).stdout,
                re.M,
            )


@pytest.mark.parametrize("cleaned", [False, True])
def test_interrupted_when_the_store_is_in_place(pair: Pair, tmp_path: Path, cleaned: bool) -> None:
    """Nothing is left to resume: the same command would say that the store exists."""
    code = f"""
import os, signal, sys
from ckdiff.cli import main
from ckdiff.stores.workdir import WorkDir
discard = WorkDir.discard
def stop(self):
    if {cleaned}:
        discard(self)
    os.kill(os.getpid(), signal.SIGINT)
WorkDir.discard = stop
main(sys.argv[1:])
"""
    out = tmp_path / "out.zarr"
    says = "interrupted (the store is complete"
    if not cleaned:
        says += f"; ckdiff clean {tmp_path} removes what is left beside it"
    for overwrite in ([], ["--overwrite"]):
        stopped = python(code, "diff", *pair, "-o", str(out), *overwrite)
        assert stopped.returncode == 130
        assert stopped.stderr.splitlines()[-1] == f"ckdiff: error: {says})"
        ok("check", str(out))
    ok("clean", str(tmp_path))
    assert list(tmp_path.iterdir()) == [out]


def test_interrupted_while_another_store_is_in_place(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    ok("diff", *pair, "-o", str(out), "--rule", "ulp=1")
    stopped = interrupted(pair, out, signal.SIGINT, "--overwrite")
    assert stopped.stderr.endswith("interrupted (the same command resumes)\n")


def test_a_second_signal_ends_the_process(pair: Pair) -> None:
    code = """
import os, signal, sys, time
from ckdiff.cli import exits, main
exits._PATIENCE = 0.05
def hang(*args):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)  # too soon: the same Ctrl-C, passed on
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
import ckdiff.diffs.run
ckdiff.diffs.run.run = hang
main(sys.argv[1:])
"""
    assert python(code, "diff", *pair).returncode == 143


def test_a_lost_signal_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits._signals, "received", signal.SIGTERM)
    with Reporter("compared") as reporter, pytest.raises(KeyboardInterrupt):
        reporter.update(1, 2)


def test_handlers_are_put_back(store: str) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ok("check", store)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# streams that go away


def test_a_closed_stdout_is_quiet(pair: Pair, store: str, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    for args, code in (
        (["--help"], 0),
        (["show", store, "--json"], 0),
        (["check", store], 0),
        (["diff", *pair, "-o", str(out), "--exit-code"], 1),  # the verdict stands
    ):
        reader, writer = os.pipe()
        os.close(reader)
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
        command = [sys.executable, "-c", MAIN, *args]
        try:
            found = subprocess.run(
                command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
            )
        finally:
            os.close(writer)
        assert found.returncode == code, found.stderr
        assert "rror" not in found.stderr
        assert "Traceback" not in found.stderr
    ok("check", str(out))


def test_a_closed_stderr_does_not_end_a_run(pair: Pair, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    out = tmp_path / "out.zarr"
    command = [sys.executable, "-c", MAIN, "diff", *pair, "-o", str(out), "--exclude", "nothing"]
    found = subprocess.run(command, env=environment, stdout=writer, stderr=writer)
    os.close(writer)
    assert found.returncode == 0
    ok("check", str(out))


def test_descriptors_that_were_closed_by_the_caller(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    code = f"import os; [os.close(n) for n in (0, 1, 2)]; os.execv({sys.executable!r}, "
    code += f"[{sys.executable!r}, '-c', {MAIN!r}, 'diff', *{pair!r}, '-o', {str(out)!r}])"
    assert python(code).returncode == 2  # nothing could be printed
    ok("check", str(out))


@pytest.mark.parametrize("args", [["--help"], ["diff", "-h"], ["show", "{}"], ["check", "{}"]])
def test_a_stdout_that_the_caller_closed_is_an_error(store: str, args: list[str]) -> None:
    arguments = [arg.format(store) for arg in args]
    code = f"import os; os.close(1); os.execv({sys.executable!r}, "
    code += f"[{sys.executable!r}, '-c', {MAIN!r}, *{arguments!r}])"
    found = python(code)
    assert found.returncode == 2
    assert found.stderr == (
        "ckdiff: error: standard output: it is closed, nothing can be printed\n"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_an_error(store: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    for args in (["show", store], ["--help"]):
        command = [sys.executable, "-c", MAIN, *args]
        with open("/dev/full", "w") as full:
            found = subprocess.run(
                command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert found.returncode == 2
        assert re.fullmatch(r"ckdiff: error: .*No space left on device.*\n", found.stderr)

"""A signal at any moment of a command's life: one line at most, and never a traceback."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_support import PACKAGE, Pair, write_pair

from ckdiff.cli import exits

INTERRUPTED = "ckdiff: error: interrupted"

#: the command as it is installed, with a moment at which it sends a signal to itself
SCRIPT = """
import os, sys
class Moment:
    def find_spec(self, name, path, target=None):
        if name == os.environ["MOMENT"] and not self.over:
            self.over = True
            os.kill(os.getpid(), int(os.environ["NUMBER"]))
    over = False
if os.environ["MOMENT"] == "exit":
    import atexit
    atexit.register(os.kill, os.getpid(), int(os.environ["NUMBER"]))
elif os.environ["MOMENT"] == "teardown":
    class Last:
        def __del__(self, kill=os.kill, pid=os.getpid(), number=int(os.environ["NUMBER"])):
            kill(pid, number)
    sys.last_of_all = Last()
else:
    sys.meta_path.insert(0, Moment())
print("begun", file=sys.stderr, flush=True)
from ckdiff.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bin") / "ckdiff"
    path.write_text(SCRIPT)
    return str(path)


def started(
    program: str, pair: Pair, moment: str, *more: str, number: int = signal.SIGINT,
    ignored: bool = False, **environment: str,
) -> subprocess.Popen[str]:  # fmt: skip
    command = [sys.executable, program, "diff", *pair, "--json", *more]
    if ignored:  # as a shell does for what a script puts into the background
        command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command]
    own = {"PYTHONPATH": str(PACKAGE), "MOMENT": moment, "NUMBER": str(int(number))}
    return subprocess.Popen(
        command,
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """The exit status, stdout, and what stderr says besides that work began."""
    out, err = process.communicate(timeout=60)
    lines = err.splitlines()
    for usual in ("begun", "ckdiff: compiling kernels (first run only)"):
        if usual in lines:
            lines.remove(usual)
    return process.returncode, out, lines


@pytest.mark.parametrize("moment", ["click", "ckdiff.cli.diff", "numpy", "ckdiff.diffs.plan"])
def test_while_something_is_imported(moment: str, program: str, pair: Pair, tmp_path: Path) -> None:
    code, out, lines = ended(started(program, pair, moment, "-o", str(tmp_path / "out.zarr")))
    assert (code, out) == (130, "")
    assert [line.partition(" (")[0] for line in lines] == [INTERRUPTED]


@pytest.mark.parametrize("moment", ["llvmlite.binding", "numba.core.errors"])
def test_while_the_compiler_is_imported(
    moment: str, program: str, pair: Pair, tmp_path: Path
) -> None:
    found = ended(started(program, pair, moment, NUMBA_CACHE_DIR=str(tmp_path)))
    assert found[:2] == (130, "")
    assert [line.partition(" (")[0] for line in found[2]] == [INTERRUPTED]


@pytest.mark.parametrize("moment", ["click", "ckdiff.diffs.plan"])
def test_sigterm_while_something_is_imported(moment: str, program: str, pair: Pair) -> None:
    code, out, lines = ended(started(program, pair, moment, number=signal.SIGTERM))
    assert (code, out) == (143, "")
    says = "ckdiff: error: stopped by SIGTERM"
    assert [line.partition(" (")[0] for line in lines] == [says]


@pytest.mark.parametrize("moment", ["exit", "teardown"])
@pytest.mark.parametrize(
    ("option", "code", "number"),
    [("--stats", 0, signal.SIGINT), ("--exit-code", 1, signal.SIGTERM)],
)
def test_when_the_work_is_done_its_status_stands(
    moment: str, option: str, code: int, number: int, program: str, pair: Pair
) -> None:
    found = ended(started(program, pair, moment, option, number=number))
    assert found[0] == code
    assert found[1].endswith("}\n")
    assert [line for line in found[2] if "gate exit-code failed" not in line] == []


def test_a_signal_that_the_caller_has_us_ignore(program: str, pair: Pair) -> None:
    """Before the run it is ignored. During the run it means what it says: nothing is lost."""
    assert ended(started(program, pair, "click", ignored=True))[0] == 0
    assert ended(started(program, pair, "numpy", ignored=True))[0] == 130
    assert ended(started(program, pair, "exit", ignored=True))[0] == 0


def test_at_any_time(program: str, pair: Pair) -> None:
    """From when Python itself is there: before that, the traceback is Python's."""
    noise = random.Random(11)
    for _ in range(6):
        process = started(program, pair, "never")
        assert process.stderr is not None
        assert process.stderr.readline() == "begun\n"
        time.sleep(0.01 + noise.random() * 0.4)
        process.send_signal(signal.SIGINT)
        code, _, lines = ended(process)
        assert code in (0, 130)
        assert [line.partition(" (")[0] for line in lines] == [INTERRUPTED] * (code == 130)


def test_signals_are_left_to_whoever_imports_us() -> None:
    code = (
        "import signal; before = signal.getsignal(2), signal.getsignal(15)\n"
        "from ckdiff.cli import main\n"
        "assert before == (signal.getsignal(2), signal.getsignal(15))"
    )
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(PACKAGE)}, check=True
    )


def test_an_alarm_that_somebody_else_set_still_ends_us(program: str, pair: Pair) -> None:
    process = started(program, pair, "ckdiff.diffs.plan", number=signal.SIGALRM)
    assert ended(process)[0] == -signal.SIGALRM


BODY = "import os, signal; os.kill(os.getpid(), signal.SIGINT); finished.append(True)"
DELICATE = {
    "import": "import module_that_is_interrupted",
    "compiler": f"exec({BODY!r}, {{'__name__': 'numba.core', 'finished': finished}})",
    "finalizer": f"""
class Thing:
    def __del__(self):
        {BODY}
Thing()
""",
}


@pytest.mark.parametrize("place", DELICATE)
def test_an_exception_waits_where_it_would_do_harm(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The work there is finished, and what follows it is not begun."""
    finished: list[bool] = []
    source = f"import builtins; finished = builtins.finished; {BODY}\n"
    (tmp_path / "module_that_is_interrupted.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.finished", finished, raising=False)

    def work() -> int:
        exec(DELICATE[place], {"finished": finished})
        time.sleep(20)
        return 0

    before = signal.getsignal(signal.SIGALRM)
    assert exits.run(work) == 130
    assert finished == [True]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert capsys.readouterr().err == f"{INTERRUPTED}\n"
    sys.modules.pop("module_that_is_interrupted", None)

"""How much is said on stderr: --quiet, --verbose, --log-level, and CKDIFF_LOG."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from cli_support import MAIN, Pair, error, ok, python, run, write_pair
from commands import command_names, commands

from ckdiff._version import __version__
from ckdiff.cli import output
from ckdiff.cli.progress import Reporter
from ckdiff.cli.voice import voice


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_before_and_after_the_command(pair: Pair, flag: str) -> None:
    loud = ok("diff", *pair)
    assert "hint: " in loud.stderr
    for arguments in ((flag, "diff", *pair), ("diff", *pair, flag), ("diff", flag, *pair)):
        done = ok(*arguments)
        assert done.stderr == ""
        assert done.stdout.splitlines()[:-1] == loud.stdout.splitlines()[:-1]  # the last has a time
    assert "hint: " in ok("diff", *pair).stderr, "it holds for one call"


def test_quiet_keeps_errors_gates_and_warnings(pair: Pair, tmp_path: Path) -> None:
    assert error("-q", "diff", str(tmp_path / "no"), pair[1]).endswith(")")
    failed = run("diff", *pair, "--exit-code", "-q")
    assert failed.exit_code == 1
    assert failed.stderr.startswith("ckdiff: gate exit-code failed")
    (tmp_path / "out.zarr").mkdir()
    warned = ok("diff", *pair, "-q", "--dry-run", "-o", str(tmp_path / "out.zarr"))
    assert warned.stderr.startswith("ckdiff: warning: a run would be refused")


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_verbose_says_what_is_chosen(pair: Pair, flag: str) -> None:
    for arguments in ((flag, "diff", *pair), ("diff", *pair, flag)):
        said = ok(*arguments).stderr
        for what in ("base.safetensors", "tuned.safetensors", "10 tensors", "workers: ", "memory:"):
            assert what in said
        assert said.splitlines()[-1].startswith("ckdiff: took ")
        assert all(line.startswith("ckdiff: ") for line in said.splitlines())
    assert "workers: " not in ok("diff", *pair).stderr


def test_verbose_of_other_commands(pair: Pair, tmp_path: Path) -> None:
    stores = [str(tmp_path / f"{i}.zarr") for i in range(2)]
    for store in stores:
        ok("diff", *pair, "-o", store)
    assert "memory:" in ok("-v", "overlap", *stores).stderr
    delta = str(tmp_path / "d")
    assert "base.safetensors" in ok("delta", *pair, "-o", delta, "-v").stderr
    shown = ok("show", stores[0], "-v").stderr
    assert "0.zarr: 10 tensors" in shown
    assert "took" in shown
    run_of = ok("timeline", *pair, "-o", str(tmp_path / "t"), "-v").stderr
    assert "workers: " in run_of
    assert "memory: " in run_of


def test_log_levels(pair: Pair) -> None:
    for arguments in (
        ("--log-level", "debug", "info", pair[0]),
        ("info", pair[0], "--log-level=DEBUG"),
    ):
        said = ok(*arguments).stderr
        assert " DEBUG ckdiff.checkpoints.opening: " in said
        assert "10 tensors" in said
    assert ok("--log-level", "warning", "info", pair[0]).stderr == ""
    assert "'debug', 'info', 'warning', 'error'" in error("--log-level", "loud", "info", pair[0])


def test_the_environment_says_the_level(pair: Pair) -> None:
    for value, says in (("debug", True), ("INFO", False), ("", False)):
        done = python(MAIN, "info", pair[0], env={"CKDIFF_LOG": value})
        assert done.returncode == 0, done.stderr
        assert ("10 tensors" in done.stderr) is says
    wrong = python(MAIN, "info", pair[0], env={"CKDIFF_LOG": "loud"})
    assert wrong.returncode == 2
    assert "CKDIFF_LOG" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


def test_not_both(pair: Pair) -> None:
    for arguments in (("-q", "-v", "info"), ("-q", "info", "-v"), ("info", "-v", "-q")):
        done = run(*arguments, pair[0])
        assert done.exit_code == 2
        assert "cannot be used together" in done.stderr


def test_nothing_is_left_behind(pair: Pair) -> None:
    logger = logging.getLogger("ckdiff")
    before = logger.level, list(logger.handlers), dict(os.environ)
    for flag in ("-q", "-v", "--log-level=info"):
        ok(flag, "info", pair[0])
        run(flag, "info", "nowhere")
    assert (logger.level, list(logger.handlers), dict(os.environ)) == before
    assert not voice.quiet
    assert not voice.logs


@pytest.mark.parametrize("name", command_names())
def test_every_command_has_them(name: str) -> None:
    known = {o for parameter in commands()[name].params for o in parameter.opts}
    assert {"-q", "--quiet", "-v", "--verbose", "--log-level"} <= known


def test_version() -> None:
    assert ok("-V").stdout == ok("--version").stdout == f"ckdiff {__version__}\n"


@pytest.mark.parametrize("name", command_names())
def test_version_after_a_command(name: str) -> None:
    assert ok(name, "-V").stdout == f"ckdiff {__version__}\n"
    (own,) = (o for o in commands()[name].params if "-V" in o.opts)
    assert own.hidden, "the help of the program lists it"
    if "--version" in own.opts:
        assert ok(name, "--version").stdout == f"ckdiff {__version__}\n"


def test_progress_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    voice.hush()
    try:
        with Reporter("compared", clock=lambda: now[0]) as reporter:
            now[0] = 100.0
            reporter.update(1, 10)
            reporter.note("a note")
            logging.getLogger("ckdiff.x").info("downloading")
            reporter.note("warning: something")
            logging.getLogger("ckdiff.x").warning("more")
    finally:
        voice.end()
    assert capsys.readouterr().err == "ckdiff: warning: something\nckdiff: more\n"
    output.remark("again")
    assert capsys.readouterr().err == "ckdiff: again\n"

"""Progress: a bar on a terminal, lines in a log, and the note about compiling."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from cli_support import MAIN, python, write_pair

from ckdiff.cli.progress import Reporter, compilation_noted, describe


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_30_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Reporter("compared", clock=clock) as reporter:
        for second in range(91):
            clock.now = 100.0 + second
            reporter.update(second * 2**30, 120 * 2**30)
        reporter.update(120 * 2**30, 120 * 2**30)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "ckdiff: compared 30.0 GiB of 120.0 GiB (25 %), 1.07 GB/s, 1 min 30 s left",
        "ckdiff: compared 60.0 GiB of 120.0 GiB (50 %), 1.07 GB/s, 1 min 0 s left",
        "ckdiff: compared 90.0 GiB of 120.0 GiB (75 %), 1.07 GB/s, 30 s left",
    ]


def test_resumed_bytes_are_not_speed() -> None:
    assert describe(80, 100, 60, 2.0) == ("80 B of 100 B", "10 B/s", "2 s left")
    assert describe(60, 100, 60, 2.0)[2] == ""
    assert describe(100, 100, 0, 0.0)[1] == "0 B/s"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    with Reporter("compared", clock=clock) as reporter:
        reporter.update(0, 1000)
        assert stream.getvalue() == ""  # nothing flashes up where all is over at once
        clock.now += 2
        reporter.update(2**30, 10 * 2**30)
        reporter.note("warning: \x1b[31m")
        reporter.update(2 * 2**30, 10 * 2**30)
    text = stream.getvalue()
    assert "1.0 GiB of 10.0 GiB" in text
    assert "537 MB/s" in text
    assert "ckdiff: warning: \\x1b[31m\n" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor comes back


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    with Reporter("compared", clock=clock) as reporter:
        clock.now += 31
        reporter.update(1, 2)
    assert stream.getvalue() == "ckdiff: compared 1 B of 2 B (50 %), 0 B/s, 31 s left\n"


def test_compiling_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    from ckdiff.kernels.compiled import on_compile

    before = list(on_compile)
    with Reporter("compared") as reporter, compilation_noted(reporter):
        for report in on_compile:
            report("exact BF16")
            report("exact F32")
    assert on_compile == before
    assert capsys.readouterr().err == "ckdiff: compiling kernels (first run only)\n"


def test_compiling_is_really_said(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = python(MAIN, "diff", *pair, env=environment)
    assert first.stderr.count("compiling kernels (first run only)") == 1
    second = python(MAIN, "diff", *pair, env=environment)
    assert "compiling" not in second.stderr

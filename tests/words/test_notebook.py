"""What is told of running work in a notebook, and that nothing is elsewhere."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ckdiff import notebook
from ckdiff.options import Progress, checked_observer

Bundle = dict[str, str]


class Output:
    """A cell's output: everything that was shown, the last of it on top."""

    def __init__(self) -> None:
        self.shown: list[Bundle] = []
        self.displays = 0

    def display(self, bundle: Bundle, *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        self.displays += 1
        self.shown.append(bundle)
        return SimpleNamespace(update=lambda bundle, raw: self.shown.append(bundle))


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Output:
    """A kernel, or what looks like one."""
    found = Output()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    shows = SimpleNamespace(display=found.display)
    monkeypatch.setitem(sys.modules, "IPython.display", shows)
    return found


def test_one_line_that_ends_with_what_was_done(output: Output) -> None:
    observer = checked_observer(None)
    observer.note("a <b>sample</b>\x1b")
    for done in range(0, 1001, 10):
        observer.progress(Progress(done << 20, 1000 << 20, 2.0, 0))
    assert output.displays == 1
    assert len(output.shown) < 10, "updates are throttled"
    last = output.shown[-1]
    assert last["text/plain"] == "done: 1000.0 MiB in 2.0 s, 500.0 MiB/s\na <b>sample</b>\\x1b"
    assert "<b>" not in last["text/html"]
    assert "<progress" not in last["text/html"]


def test_a_bar_while_it_runs() -> None:
    now = 0.0
    shown: list[Bundle] = []

    def show(bundle: Bundle) -> Any:
        shown.append(bundle)
        return shown.append

    line = notebook.Line(show, clock=lambda: now)
    line.progress(0, 100, 0.0, 0)
    assert shown == []
    for now in (0.1, 0.3, 0.4, 0.6):
        line.progress(int(100 * now), 100, now, 0)
    assert [bundle["text/plain"] for bundle in shown] == [
        "30 B of 100 B, 0 s",
        "60 B of 100 B, 1 s",
    ]
    assert '<progress value="60" max="100">' in shown[-1]["text/html"]
    line.progress(100, 100, 1.0, 40)
    line.progress(100, 100, 1.0, 40)
    assert [bundle["text/plain"] for bundle in shown[2:]] == [
        "done: 100 B in 1.0 s, 40 B of it by an earlier run, 60 B/s"
    ]


def test_nothing_to_do_is_done(output: Output) -> None:
    checked_observer(None).progress(Progress(0, 0, 0.0, 0))
    assert output.shown[-1]["text/plain"] == "done: 0 B in 0.0 s"


def test_a_browser_that_went_away_does_not_end_the_work(output: Output) -> None:
    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("gone")

    sys.modules["IPython.display"].display = gone  # type: ignore[attr-defined]
    observer = checked_observer(None)
    observer.note("one")
    observer.progress(Progress(1, 1, 0.0, 0))


def silent() -> bool:
    return notebook.line() is None


def test_nothing_elsewhere(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not silent()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(silent()))
    thread.start()
    thread.join()
    assert found == [True]
    for module in (
        SimpleNamespace(get_ipython=lambda: SimpleNamespace()),  # IPython in a terminal
        SimpleNamespace(get_ipython=lambda: None),
        SimpleNamespace(),
        None,
    ):
        monkeypatch.setitem(sys.modules, "IPython", module)
        assert silent()
    monkeypatch.delitem(sys.modules, "IPython")
    assert silent()
    assert "IPython" not in sys.modules


def test_whoever_asks_hears_it_themselves(output: Output) -> None:
    from ckdiff.options import Observer

    heard: list[str] = []
    checked_observer(Observer(note=heard.append)).note("said")
    assert (heard, output.shown) == (["said"], [])

"""docs/faults.md promises; every row names tests, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "faults.md"


def rows() -> list[tuple[str, list[str]]]:
    """The fault and the tests of each row."""
    found = []
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] != "fault" and set(cells[0]) != {"-"}:
            assert len(cells) == 3, line
            found.append((cells[0], re.findall(r"`(test_\w+\.py(?:::\w+)?)`", cells[2])))
    return found


def exists(test: str) -> bool:
    """Whether ``file.py`` has tests, or ``file.py::name`` is one."""
    file, _, name = test.partition("::")
    path = next(TESTS.rglob(file), None)
    if path is None:
        return False
    names = {
        node.name
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    return name in names if name else bool(names)


@pytest.mark.parametrize(("fault", "tests"), rows())
def test_every_promise_has_its_tests(fault: str, tests: list[str]) -> None:
    assert tests, f"no test for: {fault}"
    assert [test for test in tests if not exists(test)] == []


def test_a_test_that_is_gone_would_be_noticed() -> None:
    assert exists("test_faults_page.py::test_a_test_that_is_gone_would_be_noticed")
    assert not exists("test_faults_page.py::test_that_never_was")
    assert not exists("test_that_never_was.py")
    assert len(rows()) > 70

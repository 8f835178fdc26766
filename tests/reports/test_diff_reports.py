"""JUnit and markdown of a diff: what is in them, and that no name can act there."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path

import pytest
from diff_results import HOSTILE, lacking, result
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.diffs.gates import Gates, judge
from ckdiff.diffs.result import DiffResult
from ckdiff.errors import OutputError, UsageError
from ckdiff.reports.files import Reports
from ckdiff.reports.junit import junit
from ckdiff.reports.markdown import code, markdown

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def judged(found: DiffResult, gates: Gates) -> DiffResult:
    found.gates = judge(found, gates)
    return found


def hostile() -> DiffResult:
    other = [{"name": HOSTILE, "base": "F32", "tuned": "BF16"}]
    grown = [{"name": HOSTILE, "base": [4, 2], "tuned": [5, 2], "rows": 4}]
    tied = [{"name": HOSTILE, "same_as": HOSTILE, "side": "tuned"}]
    found = result(
        {HOSTILE: 3, "b": 0}, unpaired=[lacking(HOSTILE + "2"), lacking("x", "reshaped")],
        retyped=other, resized=grown, tied=tied, base=HOSTILE, tuned=f"hf://{HOSTILE}",
    )  # fmt: skip
    return judged(found, Gates(fail_above=0, exit_code=True, expect_changed=["*", "a*"]))


def test_two_dtypes_are_not_called_bit_identical() -> None:
    retyped = [{"name": "a", "base": "F32", "tuned": "BF16"}]
    assert b"2 of 2 tensors equal in value" in markdown(result({"a": 0, "b": 0}, retyped=retyped))
    assert b"2 of 2 tensors bit-identical" in markdown(result({"a": 0, "b": 0}))


def check_schema(data: bytes) -> ElementTree.Element:
    """What the common schema asks of a file; gives the suite."""
    root = ElementTree.fromstring(data)
    assert (root.tag, root.attrib) == ("testsuites", {})
    (suite,) = root
    required = {
        "name",
        "timestamp",
        "hostname",
        "tests",
        "failures",
        "errors",
        "time",
        "id",
        "package",
    }
    assert suite.tag == "testsuite"
    assert suite.attrib.keys() == required
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
    assert float(suite.attrib["time"]) >= 0
    tags = [child.tag for child in suite]
    cases = tags.count("testcase")
    assert tags == ["properties", *["testcase"] * cases, "system-out", "system-err"]
    assert int(suite.attrib["tests"]) == cases >= 1
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
    for each in suite[0]:
        assert (each.tag, each.attrib.keys()) == ("property", {"name", "value"})
    for case in suite.findall("testcase"):
        assert case.attrib.keys() == {"name", "classname", "time"}
        assert [child.tag for child in case] in ([], ["failure"])
        assert all(child.attrib.keys() == {"message", "type"} for child in case)
    return suite


def test_junit() -> None:
    found = judged(result({"a": 1, "b": 0}), Gates(fail_above=0.01, expect_unchanged=["b", "*"]))
    suite = check_schema(junit(found, when=WHEN))
    assert suite.attrib["name"] == "ckdiff"
    assert suite.attrib["timestamp"] == "2026-01-02T03:04:05"
    cases = {case.attrib["name"]: case.find("failure") for case in suite.findall("testcase")}
    assert list(cases) == ["fail-above", "unpaired", "expect-unchanged b", "expect-unchanged *"]
    failed = [failure for failure in cases.values() if failure is not None]
    assert [failure.attrib["type"] for failure in failed] == ["fail-above", "expect-unchanged"]
    assert "exceeds --fail-above 0.01" in failed[0].attrib["message"]
    assert str(failed[1].text).endswith("\na")
    values = {p.attrib["name"]: p.attrib["value"] for p in suite[0]}
    assert {"base": "base", "tuned": "tuned", "density:exact": "0.05"}.items() <= values.items()
    assert "version" in values


def test_junit_without_gates_is_a_suite_too() -> None:
    assert check_schema(junit(result({"a": 1}))).attrib["failures"] == "0"


def test_no_name_breaks_junit() -> None:
    data = junit(hostile())
    check_schema(data)
    text = data.decode()
    assert "<script>" not in text
    assert all(c.isprintable() or c == "\n" for c in text)


def test_markdown() -> None:
    found = judged(result({"l.0.a.w": 1, "l.1.a.w": 0}), Gates(fail_above=0.01))
    text = markdown(found).decode()
    assert text.startswith("<!-- ckdiff diff")
    assert "## ckdiff: 1 of 2 gates failed" in text
    assert "`base` → `tuned`: 20 elements in 2 tensors; 1 of 2 tensors bit-identical." in text
    assert "| `exact` | 1 | 5.00 % | 95.00 % |" in text
    assert "| `l.0` | 10 | 1 | 10.00 % |" in text
    assert "| `a` | 20 | 1 | 5.00 % |" in text
    assert "<details>" not in text
    same = markdown(judged(result({"a": 0}), Gates(exit_code=True))).decode()
    assert "## ckdiff: the gate is passed" in same
    assert "## ckdiff: nothing differs" in markdown(result({"a": 0})).decode()


def test_markdown_lists_what_was_not_compared() -> None:
    many = [lacking(f"x.{i}") for i in range(300)]
    text = markdown(result({"a": 0}, unpaired=many)).decode()
    assert "<details><summary>300 tensors not compared</summary>" in text
    assert "| `x.0` | added |  | `BF16 [4]` |" in text
    assert "`x.99`" in text
    assert "`x.100`" not in text
    assert "\nand 200 more\n" in text
    assert "**1,200 elements in 300 tensors not compared**" in text


def cells(line: str) -> list[str]:
    """The cells of a table's row, as a reader of markdown cuts it."""
    return re.split(r"(?<!\\)\|", line)[1:-1]


def test_no_name_breaks_markdown() -> None:
    text = markdown(hostile()).decode()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "<script" not in text
    assert "](" not in text
    assert set(re.findall(r"</?\w+", text)) <= {
        "<details", "</details", "<summary", "</summary", "<code", "</code",
    }  # fmt: skip
    assert text.count("-->") == text.count("<!--") == 1
    widths: list[int] = []
    for line in text.splitlines():
        if line.startswith("|"):
            widths.append(len(cells(line)))
        else:
            assert len(set(widths)) <= 1, "the rows of a table have as many cells"
            widths = []


@given(st.text(max_size=40))
def test_what_others_chose_stays_code(text: str) -> None:
    shown = code(text)
    if shown.startswith("`"):
        assert shown == f"`{text}`"
        assert not set("`|\\<>&\n") & set(text)
        assert text == text.strip()
    else:
        inner = shown.removeprefix("<code>").removesuffix("</code>")
        assert re.fullmatch(r"(&#\d+;|[^\W_]|[. ])*", inner)
    assert shown.isprintable()


# as files


def write(folder: Path, found: DiffResult | None = None) -> tuple[Path, Path]:
    xml, text = folder / "r.xml", folder / "r.md"
    Reports({"--junit": str(xml), "--markdown": text}).write(found or result({"a": 1}))
    return xml, text


def test_files_are_made_anew(tmp_path: Path) -> None:
    (tmp_path / "r.md").touch()  # as CI systems make them
    xml, text = write(tmp_path)
    check_schema(xml.read_bytes())
    before = text.read_bytes()
    write(tmp_path, result({"other": 1}, base="another"))
    assert text.read_bytes() != before
    assert b"another" in text.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.md", "r.xml"]
    assert xml.stat().st_mode & 0o111 == 0


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    for content in (b"<?xml version='1.0'?><testsuites/>", b"# notes\n", b"<!-- ckdiff"):
        for name in ("r.xml", "r.md"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(OutputError, match=r"is not a report of ckdiff"):
                write(tmp_path)
            assert (tmp_path / name).read_bytes() == content
            (tmp_path / name).unlink()
            assert list(tmp_path.iterdir()) == []
    xml, text = write(tmp_path)
    with pytest.raises(OutputError, match="not a report"):  # the one is not the other
        Reports({"--junit": text})
    (tmp_path / "link.md").symlink_to(text)
    (tmp_path / "folder").mkdir()
    for name in ("link.md", "folder", "none/r.md"):
        with pytest.raises(OutputError):
            Reports({"--markdown": tmp_path / name})
    with pytest.raises(UsageError, match="two reports"):
        Reports({"--junit": xml, "--markdown": xml})
    assert Reports({"--junit": None, "--markdown": None})

"""The gates of a diff as JUnit XML, which CI systems show beside their tests."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime

from ckdiff._version import __version__
from ckdiff.diffs.result import DiffResult, Verdict
from ckdiff.errors import printable

BEGINS = b"<?xml version='1.0' encoding='utf-8'?>\n<testsuites><testsuite name=\"ckdiff\" "
_NAMED = 1000  #: tensors that a failure lists


def junit(result: DiffResult, *, when: datetime | None = None) -> bytes:
    """One suite, ``ckdiff``, with a case for each gate; without any, one that says it was compared.

    ``when`` it was, now by default. Names are escaped, so that no character is left that XML does
    not allow.
    """
    cases = [_case(verdict) for verdict in result.gates] or [_testcase("compared")]
    began = (when or datetime.now(UTC)).astimezone(UTC)
    failures = sum(not verdict.ok for verdict in result.gates)
    suite = ElementTree.Element(
        "testsuite",
        {
            "name": "ckdiff",
            "package": "ckdiff",
            "id": "0",
            "timestamp": began.strftime("%Y-%m-%dT%H:%M:%S"),
            "hostname": "localhost",  # what the schema wants where none is told
            "tests": str(len(cases)),
            "failures": str(failures),
            "errors": "0",
            "time": f"{max(result.seconds, 0):.3f}",
        },
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(result).items():
        ElementTree.SubElement(properties, "property", name=printable(name), value=printable(value))
    suite.extend(cases)
    for stream in ("system-out", "system-err"):
        ElementTree.SubElement(suite, stream)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _case(verdict: Verdict) -> ElementTree.Element:
    named = verdict.gate if verdict.glob is None else f"{verdict.gate} {verdict.glob}"
    case = _testcase(named)
    if not verdict.ok:
        failure = ElementTree.SubElement(
            case, "failure", message=printable(verdict.reason), type=verdict.gate
        )
        names = [printable(name) for name in verdict.tensors[:_NAMED]]
        more = len(verdict.tensors) - len(names)
        lines = [printable(verdict.reason), *names, *([f"and {more:,} more"] if more else [])]
        failure.text = "\n".join(lines)
    return case


def _testcase(name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", name=printable(name), classname="ckdiff", time="0")


def _properties(result: DiffResult) -> dict[str, str]:
    densities = {f"density:{rule}": repr(c["density"]) for rule, c in result.rules.items()}
    return {
        "base": result.base,
        "tuned": result.tuned,
        "version": __version__,
        "tensors": str(len(result.table)),
        "tensors_identical": str(result.tensors_identical),
        "tensors_uncompared": str(result.uncompared["tensors"]),
        **densities,
    }

"""The kernels that are made ahead are all that the package asks for; see also tests/conftest.py, by
which a test fails that asks for another.
"""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source import PACKAGE

from ckdiff.dtypes import DTYPES
from ckdiff.errors import UsageError
from ckdiff.kernels import compiled, kinds
from ckdiff.kernels.abi import SIGNATURES
from ckdiff.kernels.binding import bind
from ckdiff.rules import ROUNDED, Rule

LISTED = frozenset(kinds.every())
WITH_KINDS = {name for name, kind in LISTED if kind}
#: those with a twin that only tests ask for: what a processor runs that has less
PORTABLE = {"changes", "put"}


def asking() -> list[tuple[str, ast.Call]]:
    """Where the package asks for a kernel, and how."""
    return [
        (f"{path.name}:{node.lineno}", node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", None)) == "c_function"
    ]


def test_all_kernels_are_listed_once() -> None:
    listed = list(kinds.every())
    assert len(set(listed)) == len(listed)
    assert {name for name, _ in listed} == set(SIGNATURES)


def test_what_is_asked_for_by_name_is_listed_with_and_without_a_kind() -> None:
    """A kernel that came to have kinds, which nobody listed, or the other way round."""
    wrong, named = [], set()
    for place, call in asking():
        name, *kind = call.args
        if isinstance(name, ast.Constant):
            named.add(name.value)
            if name.value in PORTABLE:
                continue
            if kind and not isinstance(kind[0], ast.Constant):
                fits = name.value in WITH_KINDS
            else:
                fits = (name.value, kind[0].value if kind else "") in LISTED
            if not fits:
                wrong.append((place, name.value))
    assert wrong == []
    # the others are asked for by a name in a variable, and only where there are kinds
    assert set(SIGNATURES) - named <= WITH_KINDS
    assert len(named) > 20


@given(
    st.sampled_from(list(DTYPES.values())),
    st.sampled_from(["exact", "atol", "rtol", "ulp"]),
    st.one_of(st.floats(min_value=0, allow_nan=False), st.integers(0, 1 << 70)),
    st.sampled_from(["", *ROUNDED]),
)
def test_every_rule_on_every_dtype_is_listed(dtype, rule, value, target) -> None:
    text = rule if rule == "exact" else f"{rule}={value!r}"
    try:
        parsed = Rule.parse(f"{text}@{target}" if target else text)
    except UsageError:  # a number of steps that is none
        return
    assert ("compare", bind(parsed, dtype).kind) in LISTED


@pytest.mark.parametrize(("name", "kind"), [("survey", "2"), ("blend", "24"), ("cells", "")])
def test_a_test_that_asks_for_another_fails(name, kind) -> None:
    with pytest.raises(AssertionError, match=rf"kinds\.py does not list '{name}' '{kind}'"):
        compiled.c_function(name, kind)

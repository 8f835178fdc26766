"""The public names: they resolve, say what they are, and hide nothing."""

from __future__ import annotations

import builtins
import functools
import importlib
import inspect
import re
from collections.abc import Iterator

import pytest
from source import FILES, PACKAGE, ROOT

import ckdiff


def test_public_names_resolve() -> None:
    assert len(set(ckdiff.__all__)) == len(ckdiff.__all__)
    for name in ckdiff.__all__:
        assert getattr(ckdiff, name) is not None
    assert dir(ckdiff) == sorted(ckdiff.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ckdiff.nonsense


def public_attributes(kind: type) -> Iterator[tuple[str, object]]:
    """The functions and properties that a class itself defines under public names."""
    for name, value in vars(kind).items():
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        if isinstance(value, functools.cached_property):
            value = value.func
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            yield name, value


@pytest.mark.parametrize("name", [name for name in ckdiff.__all__ if name != "__version__"])
def test_public_names_have_docstrings(name: str) -> None:
    thing = getattr(ckdiff, name)
    assert inspect.isclass(thing) or inspect.isfunction(thing)
    assert (thing.__doc__ or "").strip()
    assert not (thing.__doc__ or "").startswith(f"{name}("), "a dataclass's own words are no help"
    if inspect.isclass(thing):
        bare = [
            attribute
            for attribute, value in public_attributes(thing)
            if not (value.__doc__ or "").strip()
        ]
        assert bare == []


def test_public_names_are_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    words = set(re.findall(r"\w+", text))
    missing = [name for name in ckdiff.__all__ if name not in words and name != "__version__"]
    assert missing == []


def test_no_public_name_hides_a_builtin() -> None:
    assert [name for name in ckdiff.__all__ if hasattr(builtins, name)] == []


def test_no_module_shadows_a_public_name() -> None:
    for name in ckdiff.__all__:
        assert f"ckdiff.{name}" not in FILES


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert importlib.import_module("ckdiff").__version__ == ckdiff.__version__

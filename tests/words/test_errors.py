"""What an error says: the hint is part of its text, and stands there once."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from support import write_safetensors

import ckdiff
from ckdiff import errors
from ckdiff.errors import (
    CkdiffError,
    HeaderError,
    Interrupted,
    OutputError,
    SourceChanged,
    StoreCorrupt,
)

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


def test_what_is_damaged_always_has_a_hint() -> None:
    assert "fetch the file again" in str(HeaderError("it is wrong"))
    assert "run again" in str(SourceChanged("it is wrong"))
    assert str(StoreCorrupt("wrong")) == "wrong (restore it from a copy, or make it again)"
    assert str(StoreCorrupt("wrong", hint="upgrade")) == "wrong (upgrade)"


@pytest.mark.parametrize("kind", KINDS)
def test_the_hint_is_part_of_the_text(kind: type[CkdiffError]) -> None:
    bare, hinted = kind("it is wrong"), kind("it is wrong", hint="mend it")
    assert str(bare) == (f"it is wrong ({bare.hint})" if bare.hint else "it is wrong")
    assert str(hinted) == hinted.one_line() == "it is wrong (mend it)"
    assert (hinted.message, hinted.hint) == ("it is wrong", "mend it")
    for same in (copy.copy(hinted), pickle.loads(pickle.dumps(hinted))):  # a cluster sends them
        assert type(same) is kind
        assert (same.message, same.hint, str(same)) == ("it is wrong", "mend it", str(hinted))


def test_one_line_is_safe_for_a_terminal() -> None:
    error = StoreCorrupt("two\nlines", hint="do\tthis")
    assert error.one_line() == "two\\nlines (do\\tthis)"
    assert pickle.loads(pickle.dumps(Interrupted("x", exit_code=143))).exit_code == 143


def test_no_hint_is_said_twice(tmp_path: Path) -> None:
    """Errors that are made of others."""
    (tmp_path / "model.safetensors").write_bytes(b"short")
    (tmp_path / "more.safetensors").write_bytes(b"short")
    with pytest.raises(CkdiffError) as caught:
        ckdiff.diff(tmp_path, tmp_path)
    hint = str(caught.value.hint)
    assert str(caught.value).count(hint) == 1
    partial = tmp_path / "out.delta.ckdiff-partial"
    partial.mkdir()
    (partial / "foreign").write_bytes(b"")
    base = write_safetensors(tmp_path / "a" / "base.safetensors", {"x": ("U8", (1,), b"1")})
    with pytest.raises(OutputError) as refused:
        ckdiff.delta(base, base, tmp_path / "out.delta")
    assert str(refused.value).count(str(refused.value.hint)) == 1

"""Pictures as files: whole, of the format that was asked for, and never over somebody's work."""

from __future__ import annotations

import errno
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ckdiff.errors import OutputError, UsageError
from ckdiff.figures import agreement, saving

FIGURE = agreement.votes([5, 3, 1])
ENDINGS = list(saving.KINDS)


@pytest.mark.parametrize("ending", ENDINGS)
def test_each_format(tmp_path: Path, ending: str) -> None:
    path = FIGURE.save(tmp_path / f"votes{ending.upper()}")
    assert [path] == list(tmp_path.iterdir())
    data = path.read_bytes()
    if ending == ".json":
        found = json.loads(data)
        assert found.pop("usermeta") == {"made by": "ckdiff"}
        assert found == FIGURE.vega_lite()
    elif ending == ".svg":
        assert ElementTree.fromstring(data).tag.endswith("svg")
    else:
        assert data.startswith(b"%PDF-")
        assert b"%%EOF" in data[-40:]


def data(ending: str) -> bytes:
    """What is saved."""
    return saving.KINDS[ending](FIGURE)


@pytest.mark.parametrize("ending", ENDINGS)
def test_only_pictures_of_ours_are_replaced(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"votes{ending}"
    FIGURE.save(path)
    with pytest.raises(OutputError, match="exists"):
        FIGURE.save(path)
    agreement.votes([1, 1]).save(path, overwrite=True)
    assert path.read_bytes() != FIGURE.save(tmp_path / f"other{ending}").read_bytes()
    for mine in (b"my own", FIGURE.svg().encode(), b"%PDF-1.7\nmy own", b"{}", b"x" + data(ending)):
        path.write_bytes(mine)
        with pytest.raises(OutputError, match="not a picture that ckdiff saved"):
            FIGURE.save(path, overwrite=True)
        assert path.read_bytes() == mine
    path.write_bytes(b"")
    assert len(FIGURE.save(path, overwrite=True).read_bytes()) > 100


@pytest.mark.parametrize("name", ["votes", "votes.png", "votes.svg.gz", ".svg"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.svg, \.pdf, \.json"):
        FIGURE.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space")

    path = FIGURE.save(tmp_path / "votes.svg")
    before = path.read_bytes()
    monkeypatch.setattr(saving, "write_all", full)
    with pytest.raises(OutputError, match="free some space"):
        FIGURE.save(path, overwrite=True)
    assert path.read_bytes() == before
    assert [path] == list(tmp_path.iterdir())

"""What the build backend is told of the project beyond pyproject.toml: its readme.

README.md is read in the repository, where its links lead to files beside it. A package index
shows it without them, so there its links and pictures lead to the repository, at this version.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: a target that is no address and no place on the same page
_TARGET = r"\((?!\w+:|#)([^()\s]+)\)"
_PICTURE = re.compile(r"(!\[[^\[\]]*\])" + _TARGET)
_LINK = re.compile(r"\]" + _TARGET)


class Readme(MetadataHookInterface):
    """The readme, with links that work anywhere."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the readme to the project's metadata."""
        text = Path(self.root, "README.md").read_text("utf-8")
        said = Path(self.root, "ckdiff/_version.py").read_text("utf-8")
        (version,) = re.findall(r'^__version__ = "([^"]+)"$', said, re.M)
        text = absolute(text, metadata["urls"]["Source"], f"v{version}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, source: str, ref: str) -> str:
    """Markdown whose links to files lead to them in the repository ``source`` on GitHub."""
    raw = source.replace("://github.com/", "://raw.githubusercontent.com/")
    text = _PICTURE.sub(rf"\1({raw}/{ref}/\2)", text)
    return _LINK.sub(rf"]({source}/blob/{ref}/\1)", text)

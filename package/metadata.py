"""What the build backend is told of the project beyond pyproject.toml: its readme.

README.md is read in the repository, where its links lead to files beside it. A package index
shows it without them, so there its links and pictures lead to the repository, at this version.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: the end of a link's text, a mark of a picture before it, and a target that is no address
_LINK = re.compile(r"(!?)(\[[^\[\]]*\])\((?!\w+:|#)([^()\s]+)\)")


class Readme(MetadataHookInterface):
    """The readme, with links that work anywhere."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the readme to the project's metadata."""
        text = Path(self.root, "README.md").read_text("utf-8")
        version = re.findall(r'"(.+)"', Path(self.root, "ckdiff/_version.py").read_text("utf-8"))
        source = metadata["urls"]["Source"]
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, source, f"v{version[0]}"),
        }


def absolute(text: str, source: str, ref: str) -> str:
    """Markdown whose links to files lead to them in the repository ``source`` on GitHub."""
    raw = source.replace("://github.com/", "://raw.githubusercontent.com/")

    def link(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        place = f"{raw}/{ref}" if picture else f"{source}/blob/{ref}"
        return f"{picture}{label}({place}/{target})"

    return _LINK.sub(link, text)

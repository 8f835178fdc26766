"""The site: `sphinx-build -W docs site`. Warnings are errors."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ckdiff import __version__  # noqa: E402

project = "ckdiff"
author = "The ckdiff maintainers"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"ckdiff {release}"
html_search_scorer = str(ROOT / "docs" / "scorer.js")
html_static_path = ["static"]
html_js_files = ["found.js"]
html_theme_options = {"source_repository": "", "navigation_with_keys": True}
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]
suppress_warnings = ["myst.strikethrough", "ref.python"]  # attributes named as builtins are
autodoc_typehints = "description"
autodoc_member_order = "alphabetical"
nitpicky = False

#: a link to a file of the repository that is no page of the site
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")


def _without_repository(app: Any, name: str, source: list[str]) -> None:
    """Such a link becomes its text, and where the file is in the repository."""
    if "/" not in name:
        source[0] = _OUTSIDE.sub(r"\1 (`\2` in the repository)", source[0])


def _pictures(app: Any, error: Exception | None) -> None:
    """Pictures that a page names in HTML, for light and dark screens, are not seen by Sphinx."""
    if error is None:
        for path in sorted((ROOT / "docs" / "paper").glob("*.svg")):
            out = Path(app.outdir) / "paper"
            out.mkdir(exist_ok=True)
            shutil.copyfile(path, out / path.name)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _without_repository)
    app.connect("build-finished", _pictures)

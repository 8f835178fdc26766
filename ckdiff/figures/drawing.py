"""Vega-Lite descriptions into SVG, PDF and the script of a page: what ``vl-convert`` does.

It needs no browser, no network and no server.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

from ckdiff.errors import UsageError, install

VERSION = "6.4"  #: of Vega-Lite: the descriptions are written for it


def installed() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("vl_convert") is not None


def _library() -> ModuleType:
    try:
        import vl_convert
    except ImportError:
        raise UsageError(
            "pictures need the package vl-convert-python", hint=install("report")
        ) from None
    module: ModuleType = vl_convert
    return module


def svg(spec: dict[str, Any]) -> str:
    """A picture as SVG text. Raises UsageError without the package."""
    text: str = _library().vegalite_to_svg(spec, vl_version=VERSION)
    return text


def png(spec: dict[str, Any]) -> bytes:
    """A picture as a PNG, a pixel for each of its units. Raises as ``svg`` does."""
    data: bytes = _library().vegalite_to_png(spec, vl_version=VERSION)
    return data


def pdf(spec: dict[str, Any]) -> bytes:
    """A picture as a PDF of one page. Raises as ``svg`` does."""
    data: bytes = _library().vegalite_to_pdf(spec, vl_version=VERSION)
    return data


def identity() -> str:
    """What the script is made from: another one has another name. Raises as ``svg`` does."""
    return f"vega-lite-{VERSION}-{_library().__version__}"


@cache
def script() -> str:
    """JavaScript that defines ``vegaEmbed`` in a page, about 0.9 MB. Raises as ``svg`` does."""
    text: str = _library().javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VERSION)
    return text

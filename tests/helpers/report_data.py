"""Stores to report on, and how the numbers of a page are taken out of it again."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mask_stores import make_base, make_store, random_base

#: a name that would do harm in a page that took it for HTML
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">&\u202e'\"<b>.layers.0.x"
SHAPES = {
    "model.embed_tokens.weight": ("BF16", (64, 32)),
    **{
        f"model.layers.{layer}.{part}.weight": ("BF16", shape)
        for layer in range(12)
        for part, shape in (("mlp.up", (64, 32)), ("attn.q", (32, 32)), ("norm", (32,)))
    },
    HOSTILE: ("BF16", (8, 8)),
}


class Runs(NamedTuple):
    """A base and stores of runs that started there."""

    base: Path
    stores: list[str]


def make_runs(folder: Path, count: int = 2) -> Runs:
    """``count`` runs; layers further up changed more, and norms not at all."""
    rng = np.random.default_rng(5)
    base = random_base(rng, SHAPES)
    stores = []
    for run in range(count):
        masks = {
            name: rng.random(shape) < (0 if "norm" in name else 0.01 + 0.02 * i)
            for i, (name, (_, shape)) in enumerate(SHAPES.items())
        }
        stores.append(str(make_store(folder / f"run{run}.zarr", base, masks).path))
    return Runs(make_base(folder / "base", base), stores)


def page_json(page: str) -> dict[str, Any]:
    """What the scripts of a page are given."""
    found = re.search(r'<script type="application/json" id="page">(.*?)</script>', page, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def page_table(page: str) -> dict[str, Any]:
    """The table of all tensors, as the page unpacks it."""
    found = re.search(r'<script type="text/plain" id="table">(.*?)</script>', page, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return data

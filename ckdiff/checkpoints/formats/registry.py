"""The formats that are read. Each is a module whose ``read_contents(files)`` gives Contents."""

from __future__ import annotations

from collections.abc import Callable

from ckdiff.checkpoints.pieces import Contents
from ckdiff.checkpoints.places.place import Files
from ckdiff.naming import Line, Registry

#: the formats whose files hold more than weights, so that a key says where these are
KEYED = ("torch", "dcp", "ranks")

FORMATS: Registry[Callable[[Files], Contents]] = Registry(
    "checkpoint format",
    {
        "safetensors": Line(
            "ckdiff.checkpoints.formats.safefiles:read_contents", "safetensors files"
        ),
        "pieces": Line(
            "ckdiff.checkpoints.formats.dcppieces:read_contents",
            "safetensors files of parts of tensors",
        ),
        "torch": Line("ckdiff.checkpoints.formats.torchfiles:read_contents", "torch files"),
        "dcp": Line("ckdiff.checkpoints.formats.dcp:read_contents", "torch.distributed.checkpoint"),
        "ranks": Line(
            "ckdiff.checkpoints.formats.ranks:read_contents", "what each process of a run wrote"
        ),
    },
)

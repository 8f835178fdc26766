"""The formats that masks can be exported to: one line for each; what it is, is in its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckdiff.naming import Line, Registry

if TYPE_CHECKING:
    from ckdiff.masks.exporting.format import Format

#: the first is meant where neither the caller nor the name of the output says one
FORMATS: Registry[Format] = Registry(
    "format",
    {
        "safetensors": Line(
            "ckdiff.masks.exporting.safetensors:FORMAT", "a bool for each element; the default"
        ),
        "indices": Line(
            "ckdiff.masks.exporting.indices:FORMAT",
            "a safetensors file with the positions of ones",
        ),
        "npz": Line("ckdiff.masks.exporting.npz:FORMAT", "the default for .npz"),
        "torch": Line("ckdiff.masks.exporting.torchfile:FORMAT", "the default for .pt and .pth"),
    },
)

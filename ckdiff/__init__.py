"""ckdiff: which weights differ between two checkpoints, exactly, in bounded memory.

::

    import ckdiff

    result = ckdiff.diff("base/", "tuned/", "run1.zarr", rules=["exact", "atol=1e-5"])
    store = ckdiff.open_store("run1.zarr")
    store.mask("model.layers.0.self_attn.q_proj.weight")

Everything is imported when it is first used, so that ``import ckdiff`` costs nothing.
"""

from __future__ import annotations

from ckdiff._version import __version__

TYPE_CHECKING = False  # typing's own would be an import before the program answers signals
if TYPE_CHECKING:
    from typing import Any

    from ckdiff.checkpoints import open_checkpoint
    from ckdiff.conversions.convert import Converted, convert
    from ckdiff.deltas.apply import apply, apply_in_place
    from ckdiff.deltas.checking import check
    from ckdiff.deltas.conversion import convert_delta
    from ckdiff.deltas.delta import delta
    from ckdiff.deltas.frompatches import delta_from_patches
    from ckdiff.deltas.importing import import_masks
    from ckdiff.deltas.looking import Delta
    from ckdiff.deltas.outcome import ApplyResult, DeltaResult
    from ckdiff.deltas.patchstream import weight_patches
    from ckdiff.deltas.squash import Squashed, squash
    from ckdiff.deltas.versions.applying import AppliedVersions
    from ckdiff.deltas.versions.inplace import AppliedInPlace
    from ckdiff.deltas.versions.writing import VersionReport
    from ckdiff.deltas.weightpatch import WeightPatch
    from ckdiff.diffs.diff import diff
    from ckdiff.diffs.result import DiffResult
    from ckdiff.errors import (
        BudgetError,
        CheckpointError,
        CkdiffError,
        ClusterError,
        DeltaError,
        HeaderError,
        Interrupted,
        OutputError,
        PairingError,
        RuleError,
        SourceChanged,
        StoreCorrupt,
        StoreError,
        StoreExists,
        StoreIncomplete,
        StoreLocked,
        UsageError,
    )
    from ckdiff.figures.figure import Figure
    from ckdiff.grafts.graft import graft
    from ckdiff.masks.combine import combine
    from ckdiff.masks.exporting.exporting import export_masks
    from ckdiff.masks.random import random_mask
    from ckdiff.options import Observer, Progress
    from ckdiff.overlaps.overlap import overlap
    from ckdiff.overlaps.result import Overlap
    from ckdiff.reports.info import info
    from ckdiff.reports.report import Report, report
    from ckdiff.rules import Rule
    from ckdiff.runs.principal import principal
    from ckdiff.runs.spectrum import Spectrum, spectrum
    from ckdiff.runs.structure import structure
    from ckdiff.runs.structures.result import Structure
    from ckdiff.runs.timeline import timeline
    from ckdiff.runs.timelines.check import check_timeline
    from ckdiff.runs.timelines.result import Timeline, open_timeline
    from ckdiff.stores.maskstore import MaskStore, check_store, open_store
    from ckdiff.stores.table import TensorRecord

_ERRORS = (
    "BudgetError", "CheckpointError", "CkdiffError", "ClusterError", "DeltaError", "HeaderError",
    "Interrupted", "OutputError", "PairingError", "RuleError", "SourceChanged", "StoreCorrupt",
    "StoreError", "StoreExists", "StoreIncomplete", "StoreLocked", "UsageError",
)  # fmt: skip
_HOMES = {
    "Overlap": "ckdiff.overlaps.result",
    "overlap": "ckdiff.overlaps.overlap",
    "open_checkpoint": "ckdiff.checkpoints",
    "DiffResult": "ckdiff.diffs.result",
    "Observer": "ckdiff.options",
    "Progress": "ckdiff.options",
    "Converted": "ckdiff.conversions.convert",
    "apply": "ckdiff.deltas.apply",
    "AppliedInPlace": "ckdiff.deltas.versions.inplace",
    "AppliedVersions": "ckdiff.deltas.versions.applying",
    "apply_in_place": "ckdiff.deltas.apply",
    "VersionReport": "ckdiff.deltas.versions.writing",
    "convert": "ckdiff.conversions.convert",
    "ApplyResult": "ckdiff.deltas.outcome",
    "combine": "ckdiff.masks.combine",
    "convert_delta": "ckdiff.deltas.conversion",
    "delta": "ckdiff.deltas.delta",
    "Delta": "ckdiff.deltas.looking",
    "delta_from_patches": "ckdiff.deltas.frompatches",
    "weight_patches": "ckdiff.deltas.patchstream",
    "WeightPatch": "ckdiff.deltas.weightpatch",
    "DeltaResult": "ckdiff.deltas.outcome",
    "diff": "ckdiff.diffs.diff",
    "Figure": "ckdiff.figures.figure",
    "export_masks": "ckdiff.masks.exporting.exporting",
    "graft": "ckdiff.grafts.graft",
    "import_masks": "ckdiff.deltas.importing",
    "info": "ckdiff.reports.info",
    "Report": "ckdiff.reports.report",
    "report": "ckdiff.reports.report",
    "principal": "ckdiff.runs.principal",
    "Spectrum": "ckdiff.runs.spectrum",
    "spectrum": "ckdiff.runs.spectrum",
    "random_mask": "ckdiff.masks.random",
    "Rule": "ckdiff.rules",
    "MaskStore": "ckdiff.stores.maskstore",
    "check": "ckdiff.deltas.checking",
    "check_store": "ckdiff.stores.maskstore",
    "open_store": "ckdiff.stores.maskstore",
    "Squashed": "ckdiff.deltas.squash",
    "squash": "ckdiff.deltas.squash",
    "Structure": "ckdiff.runs.structures.result",
    "structure": "ckdiff.runs.structure",
    "TensorRecord": "ckdiff.stores.table",
    "Timeline": "ckdiff.runs.timelines.result",
    "check_timeline": "ckdiff.runs.timelines.check",
    "open_timeline": "ckdiff.runs.timelines.result",
    "timeline": "ckdiff.runs.timeline",
    **dict.fromkeys(_ERRORS, "ckdiff.errors"),
}

__all__ = [
    "AppliedInPlace",
    "AppliedVersions",
    "ApplyResult",
    "BudgetError",
    "CheckpointError",
    "CkdiffError",
    "ClusterError",
    "Converted",
    "Delta",
    "DeltaError",
    "DeltaResult",
    "DiffResult",
    "Figure",
    "HeaderError",
    "Interrupted",
    "MaskStore",
    "Observer",
    "OutputError",
    "Overlap",
    "PairingError",
    "Progress",
    "Report",
    "Rule",
    "RuleError",
    "SourceChanged",
    "Spectrum",
    "Squashed",
    "StoreCorrupt",
    "StoreError",
    "StoreExists",
    "StoreIncomplete",
    "StoreLocked",
    "Structure",
    "TensorRecord",
    "Timeline",
    "UsageError",
    "VersionReport",
    "WeightPatch",
    "__version__",
    "apply",
    "apply_in_place",
    "check",
    "check_store",
    "check_timeline",
    "combine",
    "convert",
    "convert_delta",
    "delta",
    "delta_from_patches",
    "diff",
    "export_masks",
    "graft",
    "import_masks",
    "info",
    "open_checkpoint",
    "open_store",
    "open_timeline",
    "overlap",
    "principal",
    "random_mask",
    "report",
    "spectrum",
    "squash",
    "structure",
    "timeline",
    "weight_patches",
]


#: whose names are used behind theirs, as in ``ckdiff.sync.Publisher``
_ROOMS = ("sync", "training")


def __getattr__(name: str) -> Any:
    import importlib

    if name in _ROOMS:
        return importlib.import_module(f"ckdiff.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ckdiff' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

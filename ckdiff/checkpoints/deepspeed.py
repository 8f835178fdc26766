"""Checkpoints of DeepSpeed: which of its files has all of a model, and what to do about others.

Without ZeRO it is one file, with the weights under ``module``. ZeRO 1 and 2 write that file as
well, with the weights that the model computes with; those that it is trained in lie beside it, in
the shards of the optimizer, so that it is read only where it is given by itself. ZeRO 3, tensor
and pipeline parallelism and experts leave no file that has all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ckdiff.checkpoints.folders import some
from ckdiff.checkpoints.weightnames import is_deepspeed
from ckdiff.errors import CheckpointError

MODEL = "mp_rank_00_model_states.pt"  #: the file that has all of a model, if one has
CONVERTER = "zero_to_fp32.py"  #: DeepSpeed puts it above what ZeRO writes
_OPTIMIZER = re.compile(r"(?:.*_)?zero_pp_rank_\d+_mp_rank_00_optim_states\.pt", re.ASCII)
_UNIVERSAL = "zero/"  # where a universal checkpoint has each tensor in files of its own
_RANK = re.compile(r"mp_rank_\d+_model_states\.pt", re.ASCII)
_LAYER = re.compile(r"layer_\d+[_-].*model_states\.pt", re.ASCII)
_CONVERT = (
    f"run `python {CONVERTER} DIR OUT --safe_serialization`, which DeepSpeed puts beside them, "
    "and give OUT"
)
_SAVE = "load it with what trained it, and save the whole model"


def files_of(names: Collection[str]) -> list[str]:
    """The files of DeepSpeed's among the names in a directory; Megatron calls folders so."""
    return [name for name in names if is_deepspeed(name) and not name.endswith("/")]


def has_model(names: Collection[str]) -> bool:
    """Whether ``MODEL`` is among the names of a directory and has all of a model."""
    parts = files_of(names)
    whole = all(name == MODEL or _OPTIMIZER.fullmatch(name) for name in parts)
    return whole and MODEL in parts and _UNIVERSAL not in names


def is_model(names: Collection[str]) -> bool:
    """Whether a directory of these names is a checkpoint that was saved without ZeRO."""
    return has_model(names) and CONVERTER not in names and len(files_of(names)) == 1


def trained_apart(names: Collection[str]) -> bool:
    """Whether ``MODEL``, which has all of a model, lies beside what ZeRO trains."""
    return has_model(names) and any(map(_OPTIMIZER.fullmatch, names))


def refused(
    label: str, names: Sequence[str], inside: Sequence[str], *, part: bool = False
) -> CheckpointError:
    """The error for a directory or a file ``label`` of a checkpoint that is not read: ``names``
    are what it shows of it, ``inside`` what lies in the directory that has the weights; ``part``
    says that it is a file of that directory.
    """
    is_one = "is a part of" if part else "holds"
    layers = [name for name in inside if _LAYER.fullmatch(name)]
    ranks = [name for name in inside if _RANK.fullmatch(name)]
    if layers:
        what = f"with layers or experts in {len(layers):,} files of their own: {some(layers)}"
    elif _UNIVERSAL in inside:
        what = f"with each tensor in a folder of {_UNIVERSAL}, a universal one"
    elif len(ranks) > 1:
        what = f"of {len(ranks):,} ranks, each with its part of the tensors: {some(ranks)}"
    else:
        hint = _CONVERT
        if has_model(inside):
            hint += f"; for the weights that the model computes with give {MODEL} itself"
        shown = f", {some(names)}" if names else ""
        return CheckpointError(f"{label}: {is_one} a DeepSpeed checkpoint{shown}", hint=hint)
    return CheckpointError(f"{label}: {is_one} a DeepSpeed checkpoint {what}", hint=_SAVE)

"""The words by which the keys of a torch file say what lies under them."""

from __future__ import annotations

import re
from collections.abc import Collection

#: keys that lead to weights; the first that is there is taken
KNOWN = (
    "state_dict", "model_state_dict", "model_state", "model_states", "model", "module", "params",
    "net", "network", "weights", "model_weights",
)  # fmt: skip
_AVERAGED = re.compile(r"(?:^|[^a-z])(?:ema|swa|averaged?|shadow)(?:[^a-z]|$)")
_SETTINGS = {
    "opt", "hparams", "hyper_parameters", "hyperparameters", "callbacks", "loops", "args", "config",
    "cfg", "scaler", "grad_scaler", "amp", "amp_scaler", "rng", "rng_state", "rng_states",
    "random_state", "cuda_rng_state", "numpy_rng_state", "torch_rng_state", "random_rng_state",
    "datamodule", "sampler", "dataloader", "history", "metrics", "options",
}  # fmt: skip
#: settings that a model was made with: what lies there is never taken unasked
_HYPER = {
    "opt", "hparams", "hyper_parameters", "hyperparameters", "args", "config", "cfg", "options",
}  # fmt: skip
#: the state of an optimizer or a scheduler, and not an "optimized_model"
_STEPPING = re.compile(r"(?:^|[^a-z])(?:optim(?:izers?)?|(?:lr_?)?sched(?:ulers?)?)(?:[^a-z]|$)")
#: what optimizers keep for each parameter
OPTIMIZER_VALUES = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta",
    "exp_inf", "exp_avg_sq_row", "exp_avg_sq_col", "fp32_flat_groups",
}  # fmt: skip
#: names of an optimizer's state where it was saved flat, perhaps among the weights
_FLAT = re.compile(
    r"(?:(?:chained_[0-9]{1,4}\.)?opt(?:im(?:izers?)?)?(?:_states?(?:_dict)?)?\.)?"
    r"(?:state|param_groups)\.(?P<of>.+)\.(?P<value>[^.]+)",
    re.ASCII | re.DOTALL,
)
_BEGINS = ("state.", "param_groups.", "opt", "chained_")
_SECOND = {"trainer"}  #: keys that have weights, of which others go first
LONGEST_NAME = 1 << 12  #: letters of the name of anything
_LONGEST_WORD = 64  # letters of a key that is known


def is_setting(label: str) -> bool:
    """Whether a key is that of settings, or of what an optimizer or a scheduler keeps."""
    if len(label) > LONGEST_NAME:
        return True  # no name of anything
    word = label.lower()
    return word in _SETTINGS or "optim" in word or "sched" in word


def is_known(label: str) -> bool:
    """Whether a key is known to lead to weights."""
    return len(label) <= _LONGEST_WORD and label.lower() in KNOWN


def is_averaged(label: str) -> bool:
    """Whether a key is that of averages of weights."""
    return len(label) <= _LONGEST_WORD and _AVERAGED.search(label.lower()) is not None


def is_second(label: str) -> bool:
    """Whether a key leads to weights, of which others go first."""
    return len(label) <= _LONGEST_WORD and label.lower() in _SECOND


def of_optimizer(names: Collection[str]) -> set[str]:
    """Which of some names of tensors are those of an optimizer's state: ``state.NAME.exp_avg``,
    where a tensor is called ``NAME``, or where the last part is what only optimizers keep.
    """
    flat = {n: match for n in names if n.startswith(_BEGINS) and (match := _FLAT.fullmatch(n))}
    if not flat:
        return set()
    known = set(names)
    kept = {match["of"] for match in flat.values() if match["value"] in OPTIMIZER_VALUES}
    return {
        name
        for name, match in flat.items()
        if match["value"] in OPTIMIZER_VALUES or match["of"] in known or match["of"] in kept
    }


def is_extra(name: str) -> bool:
    """Whether a name is that of what modules keep besides tensors; a tensor of it is one all the
    same.
    """
    return name == "_metadata" or name.endswith("_extra_state")


def is_stepping(label: str) -> bool:
    """Whether a key is that of an optimizer's or a scheduler's state."""
    return _STEPPING.search(label.lower()) is not None


def may_be_taken(path: tuple[str, ...]) -> bool:
    """Whether what lies aside at a path may be taken unasked, if there is nothing else.

    Some word says that it is weights, and none that it is settings or what an optimizer keeps.
    """
    said = any(is_known(part) or is_averaged(part) for part in path)
    words = [part.lower() for part in path]
    return said and not any(word in _HYPER or "optim" in word or "sched" in word for word in words)

"""What ``adapter_config.json`` of a PEFT adapter says, as far as merging needs it.

Only plain LoRA is merged. Whatever else would change the merged weights is refused by name: to
merge it as if it were LoRA would be a wrong answer that nobody notices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckdiff.checkpoints.formats.strictjson import any_value, shown, skip_blank
from ckdiff.checkpoints.views.peftpatterns import Pattern, Steps
from ckdiff.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
CONFIG_LIMIT = (1 << 20) - 1  #: bytes of a configuration that are looked at
_WHOLE_LIMIT = 1 << 10  #: modules that an adapter replaces; real ones have two
_STATE_LIMIT = 1 << 14  #: of all patterns; those of real adapters have few, or are plain names
RANK_LIMIT = 1 << 14  #: adapters have ranks of 4 to 1,024

_MERGE = "merge it with PEFT (merge_and_unload, save_pretrained), and compare what that saves"
#: settings under which the merged weight is not W + scaling * B @ A
_VARIANTS = {
    "use_dora": "DoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA, which cannot be merged",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA of parameters (target_parameters)",
    "trainable_token_indices": "trainable tokens (trainable_token_indices)",
    "velora_config": "VeLoRA",
}
#: ways to begin that leave the base weights alone; the others train from a changed base
_BEGINNINGS = ("gaussian", "eva", "orthogonal")
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What of a configuration the merge depends on."""

    rank: int
    alpha: float
    ranks: tuple[tuple[Pattern, int], ...]  #: for modules that a pattern matches, the first counts
    alphas: tuple[tuple[Pattern, float], ...]
    rslora: bool  #: scaling is alpha / sqrt(rank), not alpha / rank
    transposed: bool  #: weights of targets are (in, out); their shapes say so better, if not square
    bias: str  #: ``none``, ``all`` or ``lora_only``
    whole: tuple[str, ...]  #: modules that the adapter replaces as a whole

    def rank_of(self, module: str, steps: Steps) -> int:
        """The rank of a module of the base model, by its full name. CheckpointError."""
        return next((v for p, v in self.ranks if p.matches(module, steps)), self.rank)

    def scaling_of(self, module: str, steps: Steps) -> float:
        """What the product of a module's matrices is multiplied by. CheckpointError."""
        alpha = next((v for p, v in self.alphas if p.matches(module, steps)), self.alpha)
        rank = self.rank_of(module, steps)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def replaces(self, module: str) -> bool:
        """Whether a module is one that the adapter brings whole, or a part of one.

        As PEFT finds them: by how their names end.
        """
        return any(f"{name}." in f"{module}." for name in self.whole)


def read_config(raw: bytes, where: str = CONFIG_NAME) -> LoraConfig:
    """The configuration in the bytes of an ``adapter_config.json``.

    ``where`` is how errors name it. Raises CheckpointError for what is no configuration of a LoRA
    adapter, and for every kind of adapter that is not merged here.
    """
    given = _parsed(raw, where)
    kind = given.get("peft_type")
    if not isinstance(kind, str):
        raise _bad(where, "it has no peft_type", "give the directory that save_pretrained wrote")
    if kind != "LORA":
        raise _bad(
            where, f"an adapter of type {shown(kind, 40)}, but ckdiff merges only LORA", _MERGE
        )
    _refuse_variants(given, where)
    fields = _Fields(given, where)
    return LoraConfig(
        rank=_rank(fields, "r", fields.value("r", 8)),
        alpha=_alpha(fields, "lora_alpha", fields.value("lora_alpha", 8)),
        ranks=tuple((p, _rank(fields, "rank_pattern", v)) for p, v in fields.patterns("rank")),
        alphas=tuple((p, _alpha(fields, "alpha_pattern", v)) for p, v in fields.patterns("alpha")),
        rslora=fields.flag("use_rslora"),
        transposed=fields.flag("fan_in_fan_out"),
        bias=_bias(fields),
        whole=_names(fields, "modules_to_save"),
    )


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    if len(raw) > CONFIG_LIMIT:
        raise _bad(where, f"it has more than {CONFIG_LIMIT:,} bytes")
    try:
        given, end = any_value(raw, skip_blank(raw, 0), whole_numbers=False)
    except ValueError as error:
        raise _bad(where, f"{error}") from None
    if skip_blank(raw, end) != len(raw):
        raise _bad(where, f"something follows the JSON at byte {end}")
    if not isinstance(given, dict):
        raise _bad(where, "not a JSON object")
    return given


def _refuse_variants(given: Mapping[str, Any], where: str) -> None:
    for key, name in _VARIANTS.items():
        if given.get(key):
            raise _bad(where, f"{name} is not merged here", _MERGE)
    begun = given.get("init_lora_weights")
    if not (begun is None or isinstance(begun, bool) or begun in _BEGINNINGS):
        raise _bad(
            where,
            f"init_lora_weights={shown(str(begun), 40)} changes the base weights before training, "
            "so they are not those of the base checkpoint",
            "convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion), "
            f"or {_MERGE}",
        )
    for key, value in given.items():
        # what a later PEFT brings may change what merging means
        if value and key.startswith("use_") and key != "use_rslora" and key not in _VARIANTS:
            raise _bad(where, f"{shown(key, 40)} is set, which ckdiff does not know", _MERGE)


class _Fields:
    """Values of a configuration, by kind. Null is as good as absent."""

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self._given, self._where = given, where

    def bad(self, key: str, wanted: str) -> CheckpointError:
        return _bad(self._where, f"{key} is not {wanted}")

    def value(self, key: str, default: Any) -> Any:
        found = self._given.get(key)
        return default if found is None else found

    def flag(self, key: str) -> bool:
        found = self.value(key, False)
        if not isinstance(found, bool):
            raise self.bad(key, "true or false")
        return found

    def patterns(self, of: str) -> list[tuple[Pattern, Any]]:
        found = self.value(f"{of}_pattern", {})
        if not isinstance(found, dict):
            raise self.bad(f"{of}_pattern", "an object of names and numbers")
        made: list[tuple[Pattern, Any]] = []
        states = 0
        for text, value in found.items():
            made.append((Pattern(text, f"{self._where}: {of}_pattern"), value))
            states += made[-1][0].states
            if states > _STATE_LIMIT:
                raise _bad(
                    self._where, f"the patterns of {of}_pattern are too long together", _MERGE
                )
        return made


def _rank(fields: _Fields, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= RANK_LIMIT:
        raise fields.bad(key, f"a whole number from 1 to {RANK_LIMIT:,}")
    return value


def _alpha(fields: _Fields, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise fields.bad(key, "a number")
    return float(value)


def _bias(fields: _Fields) -> str:
    found = fields.value("bias", "none")
    if not isinstance(found, str) or found not in _BIASES:
        raise fields.bad("bias", f"one of {', '.join(_BIASES)}")
    return found


def _names(fields: _Fields, key: str) -> tuple[str, ...]:
    found = fields.value(key, [])
    if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
        raise fields.bad(key, "a list of names")
    if len(found) > _WHOLE_LIMIT:
        raise fields.bad(key, f"a list of at most {_WHOLE_LIMIT:,} names")
    return tuple(found)


def _bad(where: str, problem: str, hint: str | None = None) -> CheckpointError:
    return CheckpointError(f"{where}: {problem}", hint=hint)

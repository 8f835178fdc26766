"""Which tensor of a base each tensor of a PEFT adapter changes.

Names in an adapter are those of modules in memory: ``base_model.model.MODULE.lora_A.weight``.
Those of a checkpoint may begin otherwise (``h.0`` for ``transformer.h.0``), which one exchange of
prefixes for all modules makes up for. What is in doubt is an error: a matrix that is merged into
the wrong weight, or left out, would be a wrong answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.checkpoints.views.peft import LoraConfig
from ckdiff.errors import CheckpointError

_PREFIX = "base_model.model."  # of names in an adapter's file
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<linear>lora_[AB])(?:\.[^.]+)?\.(?P<kind>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.[^.]+)?)"
)
#: parts of names that mean another method, or something that is not merged here
_FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "lora_diag": "KaSA",
    "lora_E": "AdaLoRA",
    "trainable_tokens_delta": "trainable tokens (trainable_token_indices)",
    "token_adapter": "trainable tokens (trainable_token_indices)",
    "original_module": "a weight as it was before training",
}
_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.[^.]+$)")  # as PEFT wrote it once
#: modules that PEFT saves whole, without being asked, where the vocabulary grew
_EMBEDDINGS = ("embed_tokens", "lm_head")
_DEEPEST = (
    8  #: parts of a name that are looked at: those of real models are exchanged by one or two
)
_MERGE = "merge it with PEFT (merge_and_unload, save_pretrained), and compare what that saves"

#: the places of a module's matrices in the adapter: by ``A``, ``B``, ``bias``
Factors = dict[str, int]


@dataclass(slots=True)
class Names:
    """What the names of an adapter's tensors say, by modules of the base model in memory."""

    linear: dict[str, Factors] = field(default_factory=dict)  #: by module
    embedding: dict[str, Factors] = field(default_factory=dict)  #: by module
    whole: dict[str, int] = field(default_factory=dict)  #: tensors that replace others, by name


def read_names(names: Sequence[str], where: str) -> Names:
    """Sort an adapter's tensors. ``where`` is how errors name it. Raises CheckpointError."""
    found = Names()
    for position, stored in enumerate(names):
        name = stored.removeprefix(_PREFIX)
        foreign = next((_FOREIGN[part] for part in name.split(".") if part in _FOREIGN), None)
        if foreign is not None:
            raise _bad(where, f"{shown(stored)} is {foreign}, which is not merged here", _MERGE)
        match = _FACTOR.fullmatch(name)
        if match is None:
            _add_whole(found, name, position, where, stored)
        else:
            _add_factor(found, match, position, where, stored)
    for kind in (found.linear, found.embedding):
        for module, factors in kind.items():
            for half in {"A", "B"} - set(factors):
                raise _bad(where, f"{shown(module)} has no lora_{half}", "save the adapter again")
    return found


def _add_whole(found: Names, name: str, position: int, where: str, stored: str) -> None:
    if ".lora_" in name or name.startswith("lora_"):
        raise _bad(where, f"{shown(stored)} is not a tensor of a LoRA adapter", _MERGE)
    parts = _SAVED.sub("", name).split(".")
    name = ".".join(part for part in parts if part != "base_layer")
    if name in found.whole:
        raise _bad(where, f"{shown(stored)} is there twice", "save the adapter again")
    found.whole[name] = position


def _add_factor(found: Names, match: re.Match[str], position: int, where: str, stored: str) -> None:
    module, kind = match["module"], match["kind"]
    if "base_layer" in module.split("."):
        raise _bad(
            where, f"{shown(stored)} is LoRA of parameters, which is not merged here", _MERGE
        )
    half = (match["linear"] or match["embedding"])[-1]
    if kind == "bias":
        if half == "A":
            raise _bad(where, f"{shown(stored)} is not a tensor of a LoRA adapter", _MERGE)
        half = "bias"
    factors = (found.linear if match["linear"] else found.embedding).setdefault(module, {})
    if half in factors or (module in found.linear and module in found.embedding):
        raise _bad(where, f"{shown(stored)} is there twice", "keep one adapter in the file")
    factors[half] = position


class Placing:
    """Finds tensors of the base by the names that they have in memory."""

    def __init__(self, base: TensorTable, label: str, names: Names, where: str) -> None:
        self.at: Mapping[str, int] = {name: i for i, name in enumerate(base.names)}
        self._label, self._where = label, where
        wanted = [f"{module}.weight" for module in (*names.linear, *names.embedding)]
        # without matrices, weights that are replaced say how names begin
        wanted = wanted or list(names.whole)
        self._strip, self._add = self._exchange([name for name in wanted if name not in self.at])

    def name(self, name: str) -> str:
        """How the base would call it."""
        if name in self.at or not name.startswith(self._strip):
            return name
        return self._add + name[len(self._strip) :]

    def position(self, name: str) -> int:
        """Where in the base's table a tensor is that must be there. Raises CheckpointError."""
        found = self.at.get(self.name(name))
        if found is None:
            raise self._missing(name)
        return found

    def _missing(self, name: str) -> CheckpointError:
        hint = "give the base model that the adapter was made for"
        if name.removesuffix(".weight").rpartition(".")[2] == "lm_head":
            hint = f"is the head tied to the embedding? {_MERGE}"
        return _bad(self._where, f"{self._label} has no tensor {shown(name)} to merge into", hint)

    def _exchange(self, lacking: list[str]) -> tuple[str, str]:
        """The prefix to strip and the one to add, by which the base has all of ``lacking``.

        Of several those that keep most of the name. Nothing for nothing; where there is none,
        nothing as well, and looking a name up says what is missing.
        """
        if not lacking:
            return "", ""
        for strip in _beginnings(lacking[0]):
            tail = lacking[0][len(strip) :]
            adds = {
                name[: len(name) - len(tail)]
                for name in self.at
                if name.endswith(tail) and (len(name) == len(tail) or name[-len(tail) - 1] == ".")
            }
            fitting = sorted(add for add in adds if self._fits(lacking, strip, add))
            if len(fitting) > 1:
                raise _bad(
                    self._where,
                    f"{shown(lacking[0])} could be {shown(fitting[0] + tail)} or "
                    f"{shown(fitting[1] + tail)} of {self._label}",
                    _MERGE,
                )
            if fitting:
                return strip, fitting[0]
        return "", ""

    def _fits(self, lacking: list[str], strip: str, add: str) -> bool:
        return not _numbered(add) and all(
            name.startswith(strip) and add + name[len(strip) :] in self.at for name in lacking
        )


def _beginnings(name: str) -> list[str]:
    """The prefixes of a name that may be exchanged, the shortest first: none that has a number, as
    ``layers.3`` is not ``layers.4``; and something of the module's name is always left.
    """
    parts = name.split(".")
    cuts = [
        "".join(f"{part}." for part in parts[:n])
        for n in range(min(_DEEPEST, max(1, len(parts) - 1)))
    ]
    return [cut for cut in cuts if not _numbered(cut)]


def _numbered(prefix: str) -> bool:
    return any(part.isdigit() for part in prefix.split("."))


def may_be_new(name: str, config: LoraConfig) -> bool:
    """Whether an adapter may bring a tensor that the base has not, or has in another shape."""
    module = name.rpartition(".")[0]
    return config.replaces(module) or module.rpartition(".")[2] in _EMBEDDINGS


def _bad(where: str, problem: str, hint: str | None = None) -> CheckpointError:
    return CheckpointError(f"{where}: {problem}", hint=hint)

"""What the names of files of weights say: numbered sets, variants, adapters, training state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckdiff.naming import natural_key

SAFETENSORS = ".safetensors"
#: what torch files are called; what they are is known by their content
TORCH = (".pth.tar", ".pt.tar", ".ckpt.tar", ".bin", ".pt", ".pth", ".ckpt")

_INDEX = re.compile(
    r"(?P<stem>.+)(?P<suffix>\.safetensors|\.bin)\.index(?:\.(?P<variant>[^./]+))?\.json"
)
_NUMBERED = re.compile(r"(.+?)[-_.]([0-9]{1,9})-of-([0-9]{1,9})(?:\.([^/]+))?", re.ASCII)
_ADAPTER = re.compile(r"adapter_model.*|(?:.*_)?adapters|pytorch_lora_weights.*")
_VARIANT = re.compile(r"[^\W\d].*|[0-9]+bit.*")
_RANK = re.compile(r"(.+)_world_size_([0-9]{1,9})_rank_([0-9]{1,9})\.pt", re.ASCII)
_DEEPSPEED = re.compile(
    r"(?:.*_)?(?:zero_pp_rank|mp_rank)_\d.*|.*[_-](?:optim|model)_states\.pt", re.ASCII
)
_STATE_BEGINS = re.compile(
    r"(?:optimizers?|optim|(?:lr_)?schedulers?|sched|rng|random_states?|scaler|grad_scaler|sampler"
    r"|dataloader|dl_state_dict|training_args|train_args|trainer_state|extra_state|recipe_state"
    r"|custom_checkpoint)(?![A-Za-z])"
)
_STATE_ENDS = re.compile(r".*[._-](?:optim|optimizer|scheduler|scaler|rng|rng_state)")
#: what Megatron calls the file that also holds the model
_WITH_MODEL = re.compile(r"model(?:_optim)?_rng")


@dataclass(frozen=True, slots=True)
class IndexName:
    """The name of an index: ``STEM.SUFFIX.index[.VARIANT].json``."""

    name: str
    stem: str
    suffix: str  #: of the files that it lists
    variant: str  #: empty for none

    @property
    def twin(self) -> str:
        """The one file that would be the same model."""
        return f"{self.stem}{'.' * bool(self.variant)}{self.variant}{self.suffix}"

    @property
    def base(self) -> str:
        """The stem of the model of which it is a variant's; empty where it is no variant's."""
        before, dot, variant = self.stem.rpartition(".")
        if self.variant:
            return self.stem
        return before if dot and is_variant(variant) else ""

    @property
    def aside(self) -> bool:
        """Whether it is of something that lies beside a model: a variant, an adapter, a twin."""
        return bool(self.base) or is_consolidated(self.stem) or is_adapter(self.stem)


@dataclass(frozen=True, slots=True)
class WeightName:
    """The name of a file of weights."""

    name: str
    suffix: str
    stem: str  #: without suffix and number, and with what is between these two
    number: int = -1  #: of a numbered set; -1 for none
    count: str = ""  #: how many files that set has, as it is written


def index_name(name: str) -> IndexName | None:
    """What the name of an index says; None for any other name."""
    match = _INDEX.fullmatch(name)
    if match is None:
        return None
    return IndexName(name, match["stem"], match["suffix"], match["variant"] or "")


def weight_name(name: str, suffixes: Sequence[str] = (SAFETENSORS, *TORCH)) -> WeightName | None:
    """What the name of a file says; None where it has none of the suffixes."""
    suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
    if suffix is None or len(name) == len(suffix):
        return None
    whole = name.removesuffix(suffix)
    match = _NUMBERED.fullmatch(whole)
    if match is None:
        return WeightName(name, suffix, whole)
    stem, number, count, variant = match.groups()
    stem = f"{stem}.{variant}" if variant else stem
    return WeightName(name, suffix, stem, int(number), count)


def is_adapter(stem: str) -> bool:
    """Whether a file without its suffix is called like an adapter's."""
    return _ADAPTER.fullmatch(stem) is not None


def is_consolidated(stem: str) -> bool:
    """Whether it is called like the second copy of a model that some publish."""
    return stem.startswith("consolidated")


def is_variant(text: str) -> bool:
    """Whether what follows the dot is a variant: "fp16", and not the "1" of "model-3.1"."""
    return _VARIANT.fullmatch(text) is not None


def is_training_state(name: str) -> bool:
    """Whether a torch file is called like an optimizer's, a scheduler's or the like."""
    stem = name
    for suffix in (*TORCH, ".pkl"):
        stem = stem.removesuffix(suffix)
    if _WITH_MODEL.fullmatch(stem):
        return False
    return bool(_STATE_BEGINS.match(stem) or _STATE_ENDS.fullmatch(stem))


def is_deepspeed(name: str) -> bool:
    """Whether a file is called like a part of DeepSpeed's or Megatron's own checkpoints."""
    return _DEEPSPEED.fullmatch(name) is not None


def rank_of(name: str) -> tuple[str, int, int] | None:
    """(what it is of, processes, rank) of a file that each process wrote for itself; or None."""
    match = _RANK.fullmatch(name)
    if match is None or is_training_state(match[1]):
        return None
    return match[1], int(match[2]), int(match[3])


def variants_among(files: Iterable[WeightName]) -> list[WeightName]:
    """The files that are variants of others: ``X.VARIANT`` where there is ``X``."""
    files = list(files)
    stems = {file.stem for file in files}
    found = []
    for file in files:
        parts = file.stem.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[:i]) in stems and is_variant(".".join(parts[i:])):
                found.append(file)
                break
    return found


def numbered_sets(files: Iterable[WeightName]) -> list[list[WeightName]]:
    """The numbered sets among some files, ``X-0000i-of-0000N``, whole or not."""
    sets: dict[tuple[str, str, str], list[WeightName]] = {}
    for file in files:
        if file.number >= 0:
            sets.setdefault((file.stem, file.count, file.suffix), []).append(file)
    return list(sets.values())


def is_complete(files: Sequence[WeightName]) -> bool:
    """Whether every number of a set is there once, counted from 1 or from 0."""
    return len(files) == int(files[0].count) and not missing_names(files)


def missing_names(files: Sequence[WeightName], limit: int = 3) -> list[str]:
    """The first files of a numbered set that are not there."""
    one, numbers, count = files[0], {file.number for file in files}, int(files[0].count)
    first = 0 if 0 in numbers and count not in numbers else 1
    before, _, after = one.name.rpartition("-of-")
    stem = before.rstrip("0123456789")
    digits = len(before) - len(stem)
    lacking: list[str] = []
    for number in range(first, first + count):  # ends soon, whatever the count claims
        if len(lacking) == limit:
            break
        if number not in numbers:
            lacking.append(f"{stem}{number:0{digits}d}-of-{after}")
    return lacking


def choices(names: Iterable[str]) -> list[str]:
    """The names, with each numbered set as one: what somebody could mean."""
    result: dict[object, list[str]] = {}
    for name in sorted(names, key=natural_key):
        file = weight_name(name)
        numbered = file is not None and file.number >= 0
        key = (file.stem, file.count, file.suffix) if file is not None and numbered else name
        result.setdefault(key, []).append(name)
    return [
        names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}" for names in result.values()
    ]

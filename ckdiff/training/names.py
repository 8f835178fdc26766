"""Which mask belongs to which parameter, and what is wrong where a mask does not fit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, TypeVar, get_args

import torch
from torch import nn

from ckdiff.errors import PairingError, UsageError, printable
from ckdiff.rules import Rule
from ckdiff.stores.matching import several
from ckdiff.training import fused
from ckdiff.training.sharding import Read, cut, full_shape, local
from ckdiff.training.source import Masks, Piece, Source, joined, open_masks, whole

Missing = Literal["error", "train", "freeze"]

#: what wrappers put in front of names, in any order and number
_PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.")
#: parts that wrappers put anywhere in a name: compiled, checkpointed and sharded modules, LoRA
_INSERTED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"}
Named = TypeVar("Named")
#: what takes the mask of the part in this process from that of a parameter
Part: TypeAlias = Callable[[Read, torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class Weight:
    """A parameter of a model, once however many names it has."""

    names: list[str]  #: more than one where weights are tied
    parameter: nn.Parameter
    masks: list[str] = field(default_factory=list)  #: the tensors of the store that are this one
    #: what the mask is made of where fused names tell: parts of other tensors' masks
    pieces: list[Piece] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]


def parameter_masks(
    model: nn.Module,
    store: Masks,
    *,
    rule: str | Rule | None = None,
    missing: Missing = "error",
) -> dict[str, torch.Tensor]:
    """The mask of each trained parameter of ``model``: parameter name -> bool, True = train.

    Parameters with ``requires_grad`` are trained. Tied weights count once, under their first name.
    Names match exactly, or apart from wrappers such as ``module.`` and ``_orig_mod.``. ``missing``
    says what to do with a parameter without a mask. Raises PairingError, which says which
    parameters do not fit, and why.
    """
    return {weight.name: mask for weight, mask in fit(model, store, rule, missing)}


#: what to do where a store has parts, of what the model has fused
_AS_HELD = (
    "make the store of weights as the model has them: ckdiff.diff(base_model, tuned_model, out) in "
    "memory, or ckdiff diff of two files that torch.save wrote of state_dict(); or give a dict of "
    "parameter name -> mask"
)


def fit(
    model: nn.Module,
    store: Masks,
    rule: str | Rule | None,
    missing: Missing,
    only: Collection[torch.Tensor] | None = None,
    part: Part = cut,
) -> list[tuple[Weight, torch.Tensor]]:
    """Each trained parameter with its mask, of the shape and on the device of its local part.

    Trained are the parameters in ``only``, or those with ``requires_grad``. Of a parameter that
    is sharded (a DTensor) only the part in this process gets a mask: that of ``local(parameter)``,
    or what ``part`` makes of it.

    A mask that stands for all or nothing because there is none takes no memory.
    """
    if missing not in get_args(Missing):
        raise UsageError(
            f"missing cannot be {missing!r}", hint=f"one of {', '.join(get_args(Missing))}"
        )
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    source = open_masks(store, rule)
    weights = _weights(model)
    problems = _assign(weights, source.shapes)
    explained = _assign_fused(weights, source.shapes)
    trained = _trained(weights, only)
    problems += _mismatches(weights, source) + explained.problems
    strays = _strays(weights, source, {name for name, _ in model.named_buffers()}, explained.masks)
    orphans = [
        weight.name
        for weight in trained
        if not weight.masks and explained.weights.isdisjoint(map(plain_name, weight.names))
    ]
    untold = fused.untold([*map(plain_name, orphans)], [*map(plain_name, strays)])
    problems += untold
    if strays:
        problems.append(f"{several(strays)}: a mask without a parameter")
    if orphans and missing == "error":
        problems.append(f"{several(orphans)}: no mask")
    if problems:
        raise PairingError(
            f"the masks do not fit the model: {'; '.join(problems)}",
            hint=_AS_HELD if untold or _are_experts(orphans, strays) else _choosing(problems),
        )
    return [(weight, _mask(weight, source, missing, part)) for weight in trained]


def _are_experts(*left: Collection[str]) -> bool:
    """Whether what is left over on all sides is of experts, which models hold fused."""
    return all(any(".experts." in name for name in names) for names in left)


def _choosing(problems: list[str]) -> str:
    if problems[0].endswith(": no mask"):
        return "missing='freeze' or 'train' allows parameters without a mask"
    return "give a dict of parameter name -> mask to choose yourself"


def plain_name(name: str) -> str:
    """The name without what wrappers add: ``module._orig_mod.model.x`` -> ``x``."""
    plain = ".".join(part for part in name.split(".") if part not in _INSERTED)
    while True:
        for prefix in _PREFIXES:
            if plain.startswith(prefix):
                plain = plain[len(prefix) :]
                break
        else:
            return plain


def _weights(model: nn.Module) -> list[Weight]:
    found: dict[int, Weight] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), Weight([], parameter)).names.append(name)
    return list(found.values())


def _trained(weights: list[Weight], only: Collection[torch.Tensor] | None) -> list[Weight]:
    if only is None:
        trained = [weight for weight in weights if weight.parameter.requires_grad]
    else:
        wanted = {id(parameter) for parameter in only}
        trained = [weight for weight in weights if id(weight.parameter) in wanted]
        if len(trained) != len(wanted):
            raise PairingError(
                f"{len(wanted) - len(trained)} of {len(wanted)} parameters of the optimizer are not"
                " the model's",
                hint="give the model whose parameters the optimizer was made with",
            )
    for weight in trained:
        if weight.parameter.is_meta:
            raise UsageError(
                f"{printable(weight.name)} is on the meta device", hint="load the weights first"
            )
    return trained


def _assign(weights: list[Weight], stored: Iterable[str]) -> list[str]:
    """Fill in which masks are each weight's; gives what is ambiguous.

    Exact names come first. What they leave is matched by plain name, where that names a single
    parameter and a single mask: a guess between two could train the wrong weights.
    """
    left = dict.fromkeys(stored)
    unmatched: dict[str, list[tuple[Weight, str]]] = defaultdict(list)
    for weight in weights:
        for name in weight.names:
            if name in left:
                weight.masks.append(name)
                del left[name]
            else:
                unmatched[plain_name(name)].append((weight, name))
    plain: dict[str, list[str]] = defaultdict(list)
    for name in left:
        plain[plain_name(name)].append(name)
    problems = []
    for key, claims in unmatched.items():
        masks = plain.get(key, [])
        owners = {id(weight): weight for weight, _ in claims}
        if len(masks) == 1 and len(owners) == 1:
            claims[0][0].masks += masks
        elif masks:
            names = [name for _, name in claims]
            problems.append(f"{several(names)}: could be any of the masks {several(masks)}")
    return problems


def _assign_fused(weights: list[Weight], stored: Mapping[str, fused.Shape]) -> fused.Fit:
    """Fill in the pieces of what is fused on one side only; gives what fused names explain."""
    taken = {name for weight in weights for name in weight.masks}
    masks = _by_plain_name((name, name) for name in stored if name not in taken)
    open_weights = _by_plain_name(
        (name, weight) for weight in weights if not weight.masks for name in weight.names
    )
    found = fused.match(
        {plain: full_shape(weight.parameter) for plain, weight in open_weights.items()},
        {plain: stored[name] for plain, name in masks.items()},
    )
    for plain, pieces in found.pieces.items():
        open_weights[plain].pieces = [replace(piece, name=masks[piece.name]) for piece in pieces]
    return found


def _by_plain_name(items: Iterable[tuple[str, Named]]) -> dict[str, Named]:
    """What each plain name stands for, where that is one thing."""
    found: dict[str, dict[int, Named]] = defaultdict(dict)
    for name, item in items:
        found[plain_name(name)][id(item)] = item
    return {plain: next(iter(some.values())) for plain, some in found.items() if len(some) == 1}


def _mismatches(weights: list[Weight], source: Source) -> list[str]:
    """What is wrong with the masks that were found by name."""
    problems = []
    for weight in weights:
        shape = full_shape(weight.parameter)
        wrong = [name for name in weight.masks if source.shapes[name] != shape]
        problems += [
            f"{printable(weight.name)} is {list(shape)} in the model and"
            f" {list(source.shapes[name])} in the masks"
            for name in wrong[:1]
        ]
        if not wrong and len(weight.masks) > 1:
            first, *others = (whole(source, name) for name in weight.masks)
            if not all(torch.equal(first, other.to(first.device)) for other in others):
                problems.append(f"{several(weight.masks)}: tied weights with different masks")
    return problems


def _strays(
    weights: list[Weight], source: Source, buffers: set[str], explained: set[str]
) -> list[str]:
    """Masks that have no parameter."""
    used = {name for weight in weights for name in weight.masks}
    # a buffer is no optimizer's business, and a mask of zeros asks for nothing
    known = {plain_name(name) for name in buffers} | explained
    return [
        name
        for name in source.shapes
        if name not in used and plain_name(name) not in known and bool(whole(source, name).any())
    ]


def _mask(weight: Weight, source: Source, missing: Missing, part: Part) -> torch.Tensor:
    device = local(weight.parameter).device
    pieces = weight.pieces
    if weight.masks:
        name = weight.masks[0]
        pieces = [Piece(name, 0, math.prod(source.shapes[name]))]
    if pieces:
        mask = part(lambda start, stop: joined(source, pieces, start, stop), weight.parameter)
        return mask.to(device)
    every = torch.tensor(missing == "train", device=device)
    return part(lambda start, stop: every.expand(stop - start), weight.parameter)

"""A mask as a PEFT adapter: SHiRA with exactly the masked elements, and a way to load it again.

PEFT's own SHiRA has r * (inputs + outputs) elements in each layer, and its masks are made by a
function that does not know which layer it is asked for. Both come from how a layer is made; what
it computes with are a list of positions and a vector of values, and these can be of any length.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftConfig, PeftModel, ShiraConfig, get_peft_model
from peft.tuners.shira.layer import ShiraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ckdiff.errors import CheckpointError, PairingError, UsageError, printable
from ckdiff.rules import Rule
from ckdiff.stores.matching import several
from ckdiff.training.names import Missing, fit
from ckdiff.training.source import Masks

Elsewhere = Literal["error", "skip"]
_ADAPTER = "default"  # PEFT's name for the only one
_PREFIX = "base_model.model."  # of names in an adapter's file


@dataclass(slots=True)
class _Part:
    """The adapter of a layer."""

    positions: torch.Tensor  #: int32, (2, elements): rows and columns
    values: torch.Tensor  #: what is added to the weight there


def to_shira(
    model: nn.Module,
    store: Masks,
    *,
    rule: str | Rule | None = None,
    missing: Missing = "error",
    elsewhere: Elsewhere = "error",
    task_type: str | None = None,
) -> Any:
    """``model`` as a ``peft.PeftModel`` that trains the masked elements of its linear layers.

    The adapter has one float32 value for each masked element, zero at first, and the base weights
    do not change before it is merged. As ``get_peft_model`` does, this changes ``model`` itself.
    SHiRA is for the weights of ``nn.Linear``. If a mask marks other weights (embeddings, norms,
    biases), that is an error; with ``elsewhere="skip"`` they stay as they are. ``store``, ``rule``
    and ``missing`` are those of ``freeze_unmasked``; ``task_type`` is PEFT's.

    Save it with ``save_pretrained``, and load that with ``load_shira``. Raises UsageError,
    PairingError, StoreError.
    """
    if elsewhere not in get_args(Elsewhere):
        raise UsageError(
            f"elsewhere cannot be {elsewhere!r}", hint=f"one of {', '.join(get_args(Elsewhere))}"
        )
    # frozen parameters too: an adapter's base has no other
    every = list(model.parameters()) if isinstance(model, nn.Module) else []
    fitted = fit(model, store, rule, missing, every)
    homes = _homes(model)
    parts: dict[str, _Part] = {}
    others = []
    for weight, mask in fitted:
        count = int(mask.sum())
        if not count:
            continue
        home = homes[id(weight.parameter)]
        if len(home) == 1 and _adaptable(model, home[0]):
            values = torch.zeros(count, dtype=torch.float32, device=mask.device)
            parts[home[0].removesuffix(".weight")] = _Part(_positions(mask), values)
        else:
            others.append(weight.name)
    if others and elsewhere == "error":
        raise PairingError(
            f"SHiRA cannot train {several(others)}: not the weight of one nn.Linear, or tied",
            hint="elsewhere='skip' leaves them as they are, SubnetworkOptimizer trains them",
        )
    if not parts:
        raise PairingError("the masks mark nothing that SHiRA can train")
    config = ShiraConfig(r=1, task_type=task_type)
    return _attached(model, parts, config)


def load_shira(
    model: nn.Module, folder: str | os.PathLike[str], *, is_trainable: bool = False
) -> Any:
    """The ``peft.PeftModel`` that ``save_pretrained`` wrote to ``folder``, on the base ``model``.

    PEFT's ``PeftModel.from_pretrained`` makes layers of another size and refuses these. As there,
    the adapter is trained further only if ``is_trainable``. Raises CheckpointError if the files
    cannot be read or contradict each other, PairingError if they are for another model.
    """
    config = _config(Path(folder))
    config.inference_mode = not is_trainable
    parts, base = _read(Path(folder) / "adapter_model.safetensors")
    wrong = [name for name, part in parts.items() if not _fits(model, name, part)]
    wrong += [name for name, tensor in base.items() if not _same(model, name, tensor)]
    if wrong:
        raise PairingError(
            f"the adapter does not fit the model: {several(wrong)}",
            hint="give the base model that the adapter was made for, without other adapters",
        )
    made = _attached(model, parts, config)
    return made if is_trainable else made.eval()


# -- layers ----------------------------------------------------------------------------------------


def _attached(model: nn.Module, parts: Mapping[str, _Part], config: ShiraConfig) -> Any:
    """The model with these adapters, and no others."""
    thin = [name for name in parts if min(model.get_parameter(f"{name}.weight").shape) < 2]
    if thin:  # PEFT makes them with inputs + outputs elements, before they are replaced
        raise UsageError(f"PEFT makes no SHiRA of layers with one input or output: {several(thin)}")
    config.target_modules = "|".join(re.escape(name) for name in parts)  # each, and only these
    config.mask_fn = None  # positions are set below
    made = get_peft_model(model, config, adapter_name=_ADAPTER)
    for name, layer in _layers(made):
        part = parts[name]
        device = layer.get_base_layer().weight.device
        layer.shira_indices[_ADAPTER] = part.positions.to(device)
        layer.shira_weight[_ADAPTER] = nn.Parameter(
            part.values.to(device), requires_grad=not config.inference_mode
        )
    return made


def _layers(made: PeftModel) -> Iterator[tuple[str, ShiraLayer]]:
    for name, module in made.named_modules():
        if isinstance(module, ShiraLayer):
            yield name.removeprefix(_PREFIX), module


def _homes(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its id: more than one where weights are tied."""
    homes: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes[id(parameter)].append(name)
    return homes


def _adaptable(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a layer that SHiRA computes as the layer itself does."""
    owner, _, attribute = name.rpartition(".")
    try:
        layer = model.get_submodule(owner)
    except AttributeError:
        return False
    return (
        attribute == "weight"
        and isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward  # PEFT calls F.linear itself
        and not isinstance(layer, NonDynamicallyQuantizableLinear)  # of attention, never called
        and owner != ""  # a layer by itself has no parent to be replaced in
    )


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return mask.nonzero().t().to(torch.int32).contiguous()


def _fits(model: nn.Module, name: str, part: _Part) -> bool:
    """Whether the positions are elements of the weight of a layer that can have an adapter."""
    if not _adaptable(model, f"{name}.weight"):
        return False
    shape = torch.tensor(model.get_parameter(f"{name}.weight").shape).unsqueeze(1)
    return bool(((part.positions >= 0) & (part.positions < shape)).all())


def _same(model: nn.Module, name: str, tensor: torch.Tensor) -> bool:
    """Whether the base has this very weight."""
    try:
        weight = model.get_parameter(name).detach()
    except AttributeError:
        return False
    return weight.dtype == tensor.dtype and torch.equal(weight.cpu(), tensor)


# -- files -----------------------------------------------------------------------------------------


def _config(folder: Path) -> ShiraConfig:
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} has no adapter_config.json", hint="the folder that save_pretrained wrote"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from None
    if not isinstance(config, ShiraConfig):
        raise CheckpointError(
            f"{folder} has an adapter of type {config.peft_type}, not SHIRA",
            hint="load it with peft.PeftModel.from_pretrained",
        )
    return config


def _read(path: Path) -> tuple[dict[str, _Part], dict[str, torch.Tensor]]:
    """The adapters of layers by name, and weights of the base, which PEFT may write as well."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    parts = {}
    for key in [key for key in tensors if key.endswith(".shira_indices")]:
        name = key.removesuffix(".shira_indices")
        positions, values = tensors.pop(key), tensors.pop(f"{name}.shira_weight", None)
        if values is None or values.ndim != 1 or positions.shape != (2, len(values)):
            raise CheckpointError(f"{path}: the indices and weights of {printable(name)} differ")
        parts[name.removeprefix(_PREFIX)] = _Part(positions.to(torch.int32), values)
    if not parts:
        raise CheckpointError(f"{path} holds no SHiRA indices and weights")
    # an output layer with an adapter makes PEFT write it, and the embedding
    base = {
        key.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor
        for key, tensor in tensors.items()
    }
    return parts, base

"""Training only the masked weights with JAX: an optax transformation around any other.

::

    from ckdiff.training.optax import apply_updates, masked

    tx = masked(optax.adamw(1e-5, weight_decay=0.1), "run1.zarr")
    state = tx.init(params)
    updates, state = tx.update(gradients, state, params)
    params = apply_updates(params, updates, state)

Needs optax, and no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ckdiff.errors import PairingError, UsageError, install, printable
from ckdiff.options import checked_text
from ckdiff.rules import Rule
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.matching import several

try:
    import jax
    import jax.numpy as jnp
    import optax
except ModuleNotFoundError as error:
    raise UsageError(f"ckdiff.training.optax needs {error.name}", hint=install("optax")) from None

if TYPE_CHECKING:  # it imports torch
    from ckdiff.training.names import Missing

#: a store or its path, or masks: a flat dict by name, or a tree of dicts like the parameters
Masks: TypeAlias = MaskStore | str | os.PathLike[str] | Mapping[str, Any]


class MaskedState(NamedTuple):
    """The state of ``masked``."""

    #: a tree like the parameters, True = train: a bool array of a parameter's shape, or a single
    #: bool where it has no mask
    masks: Any
    inner: Any  #: the state of the wrapped transformation


def masked(
    tx: Any,
    store: Masks,
    *,
    rule: str | Rule | None = None,
    missing: Missing = "error",
    name: Callable[[str], str] | None = None,
) -> Any:
    """An ``optax.GradientTransformationExtraArgs``: ``tx`` for the masked elements only.

    ``tx`` gets gradients that are zero elsewhere, and its updates become -0.0 there, which
    leaves a weight as it is when it is added. ``store`` is a mask store, its path, or masks of
    parameters: bool arrays, True where the element is trained. A parameter's name is its path
    with dots, ``layers.0.kernel``, which ``name`` can turn into the store's name for it. A mask
    must have its parameter's shape: nothing is transposed. ``missing`` says what becomes of a
    parameter that has no mask: ``"error"``, ``"train"`` or ``"freeze"``.

    Masks are read by ``init``, which raises PairingError where they do not fit, and StoreError;
    they are a part of the state, one byte an element. Raises UsageError.
    """
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise UsageError(
            f"tx must be an optax transformation, not {type(tx).__name__}",
            hint="such as optax.adamw(1e-5)",
        )
    if missing not in ("error", "train", "freeze"):
        raise UsageError(f"missing cannot be {missing!r}", hint="one of error, train, freeze")
    shapes, read = _source(store, rule)
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> MaskedState:
        return MaskedState(_fit(params, shapes, read, missing, name), tx.init(params))

    def update(
        updates: Any, state: MaskedState, params: Any = None, **extra: Any
    ) -> tuple[Any, MaskedState]:
        # a multiplication would make NaN of infinity times zero
        updates = _where(state.masks, updates, 0.0)
        updates, inner = tx.update(updates, state.inner, params, **extra)
        # +0.0 would turn a weight of -0.0 into +0.0
        return _where(state.masks, updates, -0.0), MaskedState(state.masks, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def apply_updates(params: Any, updates: Any, state: Any) -> Any:
    """``optax.apply_updates`` that does not touch the unmasked elements at all.

    Adding -0.0 is not quite nothing: XLA takes subnormal weights for zeros, and quiets NaNs.
    ``state`` is the optimizer state, with that of ``masked`` somewhere in it. Raises UsageError
    where there is none.
    """
    found = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(leaf)]
    if len(found) != 1:
        raise UsageError(
            f"the optimizer state has {len(found)} states of ckdiff.training.optax.masked, not 1",
            hint="give the state that tx.update returned",
        )
    return jax.tree.map(_chosen, found[0].masks, optax.apply_updates(params, updates), params)


def _chosen(mask: Any, new: Any, old: Any) -> Any:
    """``new`` where the mask is set, elsewhere the bits of ``old``."""
    if not jnp.issubdtype(old.dtype, jnp.floating):
        return jnp.where(mask, new, old)
    # As integers: XLA's CPU backend chooses a bfloat16 by way of float32, which quiets NaNs.
    integers = f"uint{jnp.finfo(old.dtype).bits}"
    new, kept = (jax.lax.bitcast_convert_type(x, integers) for x in (new, old))
    return jax.lax.bitcast_convert_type(jnp.where(mask, new, kept), old.dtype)


def _is_state(thing: Any) -> bool:
    return isinstance(thing, MaskedState)


def _where(masks: Any, tree: Any, other: float) -> Any:
    return jax.tree.map(lambda m, x: jnp.where(m, x, jnp.asarray(other, x.dtype)), masks, tree)


# -- which mask is whose ---------------------------------------------------------------------------

Read: TypeAlias = Callable[[str], npt.NDArray[np.bool_]]


def _source(store: Masks, rule: str | Rule | None) -> tuple[dict[str, tuple[int, ...]], Read]:
    """The shapes of the masks by name, and what reads one."""
    if isinstance(store, Mapping):
        if rule is not None:
            raise UsageError("masks given as a dict have no rules", hint="leave rule= out")
        given = {key: _checked(key, mask) for key, mask in _named(store)}
        return {key: mask.shape for key, mask in given.items()}, given.__getitem__
    opened = open_store(store)
    if opened.table.names:  # an unknown rule is said before anything is set up
        opened.mask(opened.table.names[0], rule, start=0, stop=0)
    shapes = dict(zip(opened.table.names, opened.table.shapes, strict=True))
    return shapes, lambda key: opened.mask(key, rule)


def _checked(name: str, mask: Any) -> npt.NDArray[np.bool_]:
    if not (isinstance(mask, (np.ndarray, jax.Array)) and mask.dtype == np.bool_):
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise UsageError(
            f"the mask of {name!r} must be a bool array, not {kind}",
            hint="True where the element is trained",
        )
    return np.asarray(mask)


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, such as ``layers.0.kernel``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _fit(
    params: Any,
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
    missing: Missing,
    rename: Callable[[str], str] | None,
) -> Any:
    """The tree of masks for a tree of parameters; raises PairingError with all that is wrong."""
    named = _named(params)
    wanted = [
        key if rename is None else checked_text(f"the name for {key!r}", rename(key))
        for key, _ in named
    ]
    problems = [
        f"{printable(key)} is {list(leaf.shape)} in the tree and {list(shapes[at])} in the masks"
        for (key, leaf), at in zip(named, wanted, strict=True)
        if at in shapes and shapes[at] != leaf.shape
    ]
    hint = "a dict of masks chooses for itself; torch's weights are the transpose of flax kernels"
    used = set(wanted)
    stray = [key for key in shapes if key not in used and read(key).any()]
    if stray:
        problems.append(f"{several(stray)}: a mask without a parameter")
    orphans = [key for (key, _), at in zip(named, wanted, strict=True) if at not in shapes]
    if orphans and missing == "error":
        if not problems:
            hint = "missing='freeze' or 'train' allows parameters without a mask"
        problems.append(f"{several(orphans)}: no mask")
    if problems:
        raise PairingError(f"the masks do not fit the parameters: {'; '.join(problems)}", hint=hint)
    masks = [
        _placed(read(at), leaf) if at in shapes else jnp.asarray(missing == "train")
        for (_, leaf), at in zip(named, wanted, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), masks)


def _placed(mask: npt.NDArray[np.bool_], leaf: Any) -> Any:
    """The mask on the devices that the parameter is on; inside jit that is not known."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        return jax.device_put(mask, leaf.sharding)
    return jnp.asarray(mask)

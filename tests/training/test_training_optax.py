"""Training a subnetwork with optax: frozen weights keep their bits, under jit as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import mask_stores
import numpy as np
import optax
import pytest

import ckdiff
import ckdiff.training.optax as subnetwork

STEPS = 50
Tree = dict[str, Any]


def some_params(dtype: str = "float32", *, subnormal: float = 1e-39) -> Tree:
    """An embedding and a layer; among the weights zeros of both signs and subnormals."""
    rng = np.random.default_rng(3)

    def weights(*shape: int) -> Any:
        flat = rng.standard_normal(int(np.prod(shape))).astype(np.float32)
        flat[::5] = -0.0
        flat[1::5] = 0.0
        flat[2::10] = subnormal
        return jnp.asarray(flat.reshape(shape).astype(jnp.dtype(dtype)))

    return {
        "embed": {"table": weights(16, 12)},
        "layers": [{"kernel": weights(12, 16), "bias": weights(16)}],
    }


def some_masks(params: Tree, seed: int = 4) -> Tree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.random(x.shape) < 0.4, params)


def loss_of(params: Tree, step: Any) -> Any:
    tokens = (jnp.arange(8) * 3 + step) % 16
    layer = params["layers"][0]
    logits = jnp.tanh(params["embed"]["table"][tokens]) @ layer["kernel"] + layer["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype("float32"), (tokens * 5 + 1) % 16
    ).mean()


def bits(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}"), tree)


def check(before: Tree, after: Tree, masks: Tree) -> None:
    """Frozen bits are as before; most of the masked ones are not."""

    def same(old: Any, new: Any, mask: Any) -> None:
        mask = np.broadcast_to(mask, old.shape)
        assert (old == new)[~mask].all(), f"{(old != new)[~mask].sum()} frozen elements changed"
        if mask.any():
            assert (old != new)[mask].mean() > 0.5

    jax.tree.map(same, bits(before), bits(after), masks)


gradients_of = jax.jit(jax.grad(loss_of))


def train(
    tx: Any, params: Tree, masks: Tree, apply: Any = subnetwork.apply_updates
) -> tuple[Tree, Any]:
    """Some steps under jit; frozen elements get infinite gradients now and then."""

    @jax.jit
    def step(params: Tree, state: Any, at: Any) -> Any:
        gradients = jax.tree.map(
            lambda g, m: jnp.where(m | (at % 7 > 0), g, jnp.inf),
            jax.grad(loss_of)(params, at),
            masks,
        )
        updates, state = tx.update(gradients, state, params)
        return apply(params, updates, state), state

    state = jax.jit(tx.init)(params)
    for at in range(STEPS):
        params, state = step(params, state, at)
    return params, state


@pytest.fixture
def masks() -> Tree:
    return some_masks(some_params())


INNER = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
    ),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in INNER), ("adamw", "bfloat16")]
)
def test_frozen_weights_keep_their_bits(name: str, dtype: str, masks: Tree) -> None:
    params = some_params(dtype)
    after, _ = train(subnetwork.masked(INNER[name](), masks), params, masks)
    check(params, after, masks)


def test_masked_weights_train_as_without_a_mask(masks: Tree) -> None:
    """Element-wise optimizers do with the masked elements what they would do anyway."""
    params = some_params()
    tx = subnetwork.masked(optax.adamw(1e-2, weight_decay=0.1), masks)
    dense = optax.adamw(1e-2, weight_decay=0.1)
    gradients = gradients_of(params, 0)
    ours, _ = jax.jit(tx.update)(gradients, jax.jit(tx.init)(params), params)
    theirs, _ = jax.jit(dense.update)(gradients, jax.jit(dense.init)(params), params)
    jax.tree.map(
        lambda a, b, m: np.testing.assert_array_equal(np.asarray(a)[m], np.asarray(b)[m]),
        ours,
        theirs,
        masks,
    )


def test_norms_are_those_of_the_subnetwork(masks: Tree) -> None:
    params = some_params()
    seen = {}

    def norm(tree: Tree) -> float:
        leaves = [np.asarray(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)]
        return float(np.sqrt(sum((leaf**2).sum() for leaf in leaves)))

    def watch(updates: Any, state: Any, params: Any = None) -> Any:
        seen["norm"] = norm(updates)
        return updates, state

    watcher = optax.GradientTransformation(lambda params: optax.EmptyState(), watch)
    tx = subnetwork.masked(watcher, masks)
    gradients = gradients_of(params, 0)
    tx.update(gradients, tx.init(params), params)
    assert seen["norm"] == pytest.approx(
        norm(jax.tree.map(lambda g, m: np.asarray(g)[m], gradients, masks))
    )
    assert seen["norm"] < 0.9 * norm(gradients)


def test_plain_apply_updates_keeps_all_but_subnormals(masks: Tree) -> None:
    params = some_params(subnormal=1.0)
    tx = subnetwork.masked(optax.adamw(1e-2, weight_decay=0.1), masks)
    after, _ = train(tx, params, masks, lambda p, u, state: optax.apply_updates(p, u))
    check(params, after, masks)
    kernel, mask = np.asarray(params["layers"][0]["kernel"]), masks["layers"][0]["kernel"]
    assert (np.signbit(kernel) & (kernel == 0) & ~mask).any(), "weights of -0.0 are among them"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_value_there_is_stays(dtype: str) -> None:
    every = jnp.asarray(np.arange(65536, dtype=np.uint16).view(jnp.dtype(dtype)))
    params, nans = {"w": every}, {"w": jnp.full_like(every, jnp.nan)}
    tx = subnetwork.masked(optax.sgd(1.0), {"w": np.zeros(65536, bool)})
    updates, state = tx.update(nans, tx.init(params), params)
    for apply in (subnetwork.apply_updates, jax.jit(subnetwork.apply_updates)):
        np.testing.assert_array_equal(bits(apply(params, updates, state))["w"], bits(params)["w"])


def test_inside_other_transformations(masks: Tree) -> None:
    """MultiSteps gives updates of +0.0 in between, and a chain may decay all weights."""
    params = some_params()
    tx = optax.chain(
        optax.MultiSteps(subnetwork.masked(optax.adamw(1e-1), masks), 2),
        optax.add_decayed_weights(1e-2),
    )
    after, state = train(tx, params, masks)
    check(params, after, masks)
    with pytest.raises(ckdiff.UsageError, match="has 0 states of"):
        subnetwork.apply_updates(params, params, optax.sgd(1.0).init(params))
    with pytest.raises(ckdiff.UsageError, match="has 2 states of"):
        subnetwork.apply_updates(params, params, (state, state))


def test_from_a_store(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w.kernel": ("BF16", (6, 8)), "w.bias": ("BF16", (8,))}
    base = mask_stores.random_base(rng, shapes)
    flags = {name: rng.random(shape) < 0.5 for name, (_, shape) in shapes.items()}
    store = mask_stores.make_store(tmp_path / "run.zarr", base, flags)
    params = {
        "params": {"w": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}, "new": jnp.ones((3,))}
    }
    with pytest.raises(ckdiff.PairingError) as caught:
        subnetwork.masked(optax.sgd(0.1), store).init(params)
    assert "w.bias, w.kernel: a mask without a parameter" in str(caught.value)
    assert "params.new, params.w.bias, params.w.kernel: no mask" in str(caught.value)
    for missing in ("freeze", "train"):
        tx = subnetwork.masked(
            optax.sgd(0.1),
            tmp_path / "run.zarr",
            rule="exact",
            missing=missing,
            name=lambda name: name.removeprefix("params."),
        )
        state = jax.jit(tx.init)(params)
        updates, state = tx.update(params, state, params)
        after = subnetwork.apply_updates(params, updates, state)
        expected = {"w": {key[2:]: mask for key, mask in flags.items()}}
        check(params, after, {"params": {**expected, "new": missing == "train"}})
    with pytest.raises(ckdiff.UsageError, match="no mask for the rule"):
        subnetwork.masked(optax.sgd(0.1), store, rule="atol=1e-5")


def test_what_does_not_fit() -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    tx = optax.sgd(0.1)
    yes = np.ones((3, 2), bool)

    def complaint(masks: Any, **options: Any) -> str:
        with pytest.raises(ckdiff.CkdiffError) as caught:
            subnetwork.masked(tx, masks, **options).init(params)
        return caught.value.one_line()

    text = complaint({"a": yes, "b": yes[:, 0]})
    assert "a is [2, 3] in the tree and [3, 2] in the masks" in text
    assert "transpose" in text
    text = complaint({"a": yes.T})
    assert "b: no mask (missing=" in text
    # masks of nothing are no one's business
    spare = np.zeros(5, bool)
    subnetwork.masked(tx, {"a": yes.T, "c": spare}, missing="freeze").init(params)
    assert "c: a mask without a parameter" in complaint({"a": yes.T, "c": ~spare})
    assert "must be a bool array, not float32" in complaint({"a": jnp.ones((2, 3))})
    assert "the mask of 'a.0' must be a bool array, not int" in complaint({"a": [1, 0]})
    assert "have no rules" in complaint({"a": yes}, rule="exact")
    assert "missing cannot be 'x'" in complaint({"a": yes}, missing="x")
    assert "must be text, not" in complaint({"a": yes}, name=lambda name: 1)
    with pytest.raises(ckdiff.UsageError, match="must be an optax transformation, not type"):
        subnetwork.masked(optax.GradientTransformation, {"a": yes})


def run(code: str, **environ: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environ,
    ).stdout


def test_without_torch_on_two_devices() -> None:
    """Masks are where the parameters are."""
    code = """if 1:
        import sys
        sys.modules["torch"] = None
        import jax, numpy, optax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from ckdiff.training.optax import apply_updates, masked
        place = NamedSharding(Mesh(jax.devices(), ("x",)), PartitionSpec("x"))
        params = {"w": jax.device_put(numpy.ones((2, 2), numpy.float32), place)}
        tx = masked(optax.sgd(0.5), {"w": numpy.eye(2) > 0})
        updates, state = tx.update(params, tx.init(params), params)
        print(len(jax.devices()), state.masks["w"].sharding == place)
        print(apply_updates(params, updates, state)["w"].tolist())
    """
    found = run(code, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert found == "2 True\n[[0.5, 1.0], [1.0, 0.5]]\n"


def test_what_is_not_installed_is_said() -> None:
    code = """if 1:
        import sys
        sys.modules["jax"] = None
        import ckdiff
        try:
            import ckdiff.training.optax
        except ckdiff.UsageError as error:
            print(error.one_line())
    """
    assert run(code) == "ckdiff.training.optax needs jax (pip install 'ckdiff[optax]')\n"

"""Watching training: what a monitor counts is what a diff of saved checkpoints counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn, optim
from training_support import Tied, Tiny, Wrap, one_thread, train

import ckdiff
from ckdiff.rules import Rule
from ckdiff.stores.summaries import module_of
from ckdiff.training import Look, UpdateMonitor
from ckdiff.training import monitor as monitor_module

__all__ = ["one_thread"]  # a fixture


def saved(model: nn.Module, path: Path) -> Path:
    """The weights of a model in a file, as they are now."""
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    return path


def by_module(base: Any, tuned: Any, out: Path, rule: str) -> dict[str, tuple[int, int]]:
    """Module -> (elements, changed) as a diff says."""
    store = ckdiff.diff(base, tuned, out, rules=[rule], overwrite=True).store
    assert store is not None
    rows = store.summary(by="module")
    return {
        row["group"]: (row["elements"], row["rules"][str(Rule.parse(rule))]["changed"])
        for row in rows
    }


def start_of(look: Look) -> dict[str, tuple[int, int]]:
    return {name: (row.elements, row.changed) for name, row in look.modules.items()}


def last_of(look: Look) -> dict[str, tuple[int, int | None]]:
    return {name: (row.elements, row.changed_since_last) for name, row in look.modules.items()}


@pytest.mark.parametrize(
    ("dtype", "rule"),
    [
        (torch.float32, "exact"),
        (torch.float32, "exact@bf16"),
        (torch.float32, "atol=5e-4"),
        (torch.bfloat16, "exact"),
        (torch.bfloat16, "ulp=1"),
    ],
)
def test_every_look_is_a_diff(dtype: torch.dtype, rule: str, tmp_path: Path) -> None:
    model = Tiny(dtype, width=1501)  # matrices of several mask words, and no multiple of one
    optimizer = optim.SGD(model.parameters(), lr=0.02)
    monitor = UpdateMonitor(model, rule=rule)
    files = [saved(model, tmp_path / "0.safetensors")]
    for step in range(1, 4):
        train(model, optimizer, steps=2)
        look = monitor.look()
        files.append(saved(model, tmp_path / f"{step}.safetensors"))
        expected = by_module(files[0], files[-1], tmp_path / "s.zarr", rule)
        assert start_of(look) == expected
        assert last_of(look) == by_module(files[-2], files[-1], tmp_path / "s.zarr", rule)
        assert look.changed == sum(changed for _, changed in expected.values())
        assert look.elements == sum(elements for elements, _ in expected.values())
        assert 0 < look.density < 1
        assert dict(look) == {name: changed / n for name, (n, changed) in expected.items()}


def test_nothing_changed_is_zero_and_one_bit_is_one() -> None:
    model = Tiny(torch.bfloat16)
    monitor = UpdateMonitor(model)
    assert monitor.look().changed == 0
    with torch.no_grad():
        model.head.weight.view(torch.int16)[0, 0] ^= 1
        model.norm.bias.neg_()  # zeros of the other sign
    look = monitor.look()
    assert start_of(look)["head.weight"] == (model.head.weight.numel(), 1)
    assert look["norm.bias"] == 1
    assert look.density_since_last == look.density
    look = monitor.look()
    assert (look.changed, look.density_since_last) == (1 + len(model.norm.bias), 0)


def test_steps() -> None:
    model = Tiny()
    monitor = UpdateMonitor(model, every=3)
    looks = [monitor.step() for _ in range(7)]
    assert [look.step for look in looks if look is not None] == [3, 6]
    assert [i for i, look in enumerate(looks) if look is not None] == [2, 5]
    assert monitor.look(100).step == 100


def test_one_copy_or_two() -> None:
    model = Tiny()
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert UpdateMonitor(model).nbytes == 2 * size
    monitor = UpdateMonitor(model, since_last=False, keep="cpu")
    assert monitor.nbytes == size
    look = monitor.look()
    assert look.density_since_last is None
    assert look.since_last is None
    assert "changed_since_last" not in look.to_dict()
    assert set(look.metrics()) == {"update/density", *(f"update/density/{name}" for name in look)}


def test_what_loggers_get() -> None:
    model = Wrap("layers", nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    monitor = UpdateMonitor(model)
    with torch.no_grad():
        model.get_submodule("layers.1").bias.add_(1)  # type: ignore[operator]
    look = monitor.look()
    assert look.metrics() == {
        "update/density": 2 / 14,
        "update/density/weight": 0,
        "update/density/bias": 2 / 4,
        "update/density_since_last": 2 / 14,
        "update/density_since_last/weight": 0,
        "update/density_since_last/bias": 2 / 4,
    }
    assert all(key.startswith("sparsity/") for key in look.metrics("sparsity"))
    assert [module_of(name) for name, _ in model.named_parameters()] == [*look, *look]


# what is watched


def test_tied_weights_count_once(tmp_path: Path) -> None:
    model = Tied()
    assert UpdateMonitor(model).look().elements == 24
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    model.lm_head.weight.data = model.embed.weight.data  # two parameters, one memory
    monitor = UpdateMonitor(model)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    assert start_of(monitor.look()) == {"embed.weight": (24, 4)}
    save_file({"lm_head.weight": model.lm_head.weight.detach() + 1}, tmp_path / "x.safetensors")
    assert UpdateMonitor(model, tmp_path / "x.safetensors").look().changed == 24


def test_what_is_trained_is_watched() -> None:
    model = Tiny()
    model.embed.requires_grad_(False)
    every = sum(parameter.numel() for parameter in model.parameters())
    assert UpdateMonitor(model).look().elements == every - model.embed.weight.numel()
    assert UpdateMonitor(model, watch="parameters").look().elements == every
    model.requires_grad_(False)
    with pytest.raises(ckdiff.UsageError, match="no trainable parameters"):
        UpdateMonitor(model)


class Buffers(nn.Module):
    """Buffers of every kind; one of them is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))
        kinds: dict[str, Any] = {
            "phase": torch.complex64, "count": torch.int64, "flags": torch.bool,
            "codes": torch.uint8, "eighth": torch.float8_e4m3fn, "wide": torch.float64,
        }  # fmt: skip
        for name, dtype in kinds.items():
            self.register_buffer(name, torch.zeros(7).to(dtype))
        self.register_buffer("odd", torch.zeros(3, dtype=torch.complex128))
        self.register_buffer("cache", torch.zeros(9), persistent=False)


def test_buffers_of_every_kind(tmp_path: Path) -> None:
    model = Buffers()
    assert UpdateMonitor(model).look().elements == 5
    monitor = UpdateMonitor(model, watch="all", rule="atol=0.5")
    before = {k: v.clone() for k, v in model.state_dict().items() if k != "odd"}
    for buffer in model.buffers():
        buffer[2] = 1 if buffer.dtype == torch.bool else 2
    model.get_buffer("phase")[3] += 0.25j  # changed: complex numbers know only exact
    look = monitor.look()
    after = {k: v for k, v in model.state_dict().items() if k != "odd"}
    assert start_of(look) == by_module(before, after, tmp_path / "s.zarr", "atol=0.5")
    assert start_of(look)["phase"] == (7, 2)
    assert "cache" not in look
    assert look.uncompared == ["odd"]


def test_a_strided_weight(tmp_path: Path) -> None:
    model = nn.Linear(40, 30, bias=False)
    model.weight = nn.Parameter(torch.randn(40, 60).t()[::2])
    assert not model.weight.is_contiguous()
    monitor = UpdateMonitor(model)
    before = model.weight.detach().clone()
    for _ in range(2):
        with torch.no_grad():
            model.weight[3, ::2] += 1
        look = monitor.look()
        assert look.changed == int((model.weight != before).sum()) == 20
        assert look.modules["weight"].changed_since_last == 20


def test_wrappers_are_not_in_names() -> None:
    model = Tiny()
    assert list(UpdateMonitor(Wrap("_orig_mod", model)).look()) == list(UpdateMonitor(model).look())


# what becomes of weights between looks


def test_a_weight_that_is_elsewhere_is_found() -> None:
    model = Tiny()
    monitor = UpdateMonitor(model)
    model.up.weight.data = model.up.weight.data.clone()
    model.head.weight = nn.Parameter(model.head.weight.detach() + 1)
    model.down.weight.data = model.down.weight.data.t().contiguous().t()  # of other strides
    look = monitor.look()
    assert look.changed == model.head.weight.numel()
    assert not look.uncompared


def test_a_weight_of_another_shape_is_in_no_count() -> None:
    model = Tiny()
    monitor = UpdateMonitor(model)
    model.head = nn.Linear(12, 20, bias=False)
    model.up.half()
    model.register_parameter("new", nn.Parameter(torch.ones(3)))
    del model.norm.bias
    left = [model.embed.weight, model.norm.weight, model.down.weight]
    for _ in range(2):
        look = monitor.look()
        assert set(look.uncompared) == {"head.weight", "up.weight", "up.bias", "new", "norm.bias"}
        assert look.elements == sum(parameter.numel() for parameter in left)
        assert look.metrics()["update/uncompared"] == 5
    model.to(torch.float64)
    with pytest.raises(ckdiff.PairingError, match="none of the watched weights is as it was"):
        monitor.look()


def test_what_was_watched_is_watched_on() -> None:
    model = Tiny()
    model.embed.requires_grad_(False)
    monitor = UpdateMonitor(model)
    elements = monitor.look().elements
    model.up.requires_grad_(False)  # as when layers are frozen one by one
    with torch.no_grad():
        model.up.weight += 1
    look = monitor.look()
    assert (look.elements, look.uncompared) == (elements, [])
    assert look["up.weight"] == 1
    model.embed.requires_grad_(True)
    assert monitor.look().uncompared == ["embed.weight"]


def test_a_look_that_fails_is_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny()
    monitor = UpdateMonitor(model)
    with torch.no_grad():
        model.up.weight += 1
    with monkeypatch.context() as patch:
        patch.setattr(monitor_module, "count", fail)
        with pytest.raises(ckdiff.SourceChanged):
            monitor.look()
    look = monitor.look()
    assert (look["up.weight"], look.density_since_last) == (1, 0)


def fail(*args: Any) -> Any:
    raise ckdiff.SourceChanged("training goes on")


def test_the_copies_are_not_the_model() -> None:
    model = Tiny()
    monitor = UpdateMonitor(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3)
    assert monitor.look().density == 1
    assert monitor.look().density_since_last == 0


# a base


def test_a_base_in_every_form(tmp_path: Path) -> None:
    model, base = Tiny(), Tiny()
    with torch.no_grad():
        base.up.weight[::2] += 1
    path = saved(base, tmp_path / "base.safetensors")
    torch.save(base.state_dict(), tmp_path / "base.pt")
    prefixed = {f"module.{name}": value for name, value in base.state_dict().items()}
    for given in (path, str(tmp_path / "base.pt"), base, base.state_dict(), prefixed):
        look = UpdateMonitor(model, given).look()
        assert look.changed == model.up.weight[::2].numel()
        assert look.density_since_last == 0, "the last look was when it was made"


def test_a_base_of_another_dtype() -> None:
    small, master = Tiny(torch.bfloat16), Tiny()
    with torch.no_grad():
        master.load_state_dict(small.state_dict())
        master.up.weight.mul_(1.0001)  # lost in bfloat16
    assert UpdateMonitor(master, small).look()["up.weight"] > 0.5
    assert UpdateMonitor(master, small, rule="exact@bf16").look().changed == 0
    assert UpdateMonitor(small, master, rule="exact@bf16").look().changed == 0
    with pytest.raises(ckdiff.PairingError, match=r'F32 in Tiny and BF16.*rule="exact@bf16"'):
        UpdateMonitor(small, master)
    counts = {name: value.to(torch.int32) for name, value in small.state_dict().items()}
    with pytest.raises(ckdiff.PairingError, match="give a base in the model's dtype"):
        UpdateMonitor(small, counts)


def test_a_base_that_does_not_fit(tmp_path: Path) -> None:
    model = Tiny()
    state = model.state_dict()
    with pytest.raises(ckdiff.PairingError, match=r"lacks what is watched of the model: head\.wei"):
        UpdateMonitor(model, {k: v for k, v in state.items() if k != "head.weight"})
    with pytest.raises(ckdiff.PairingError, match=r"up.weight is \[37, 12\] in the model and \[12"):
        UpdateMonitor(model, {**state, "up.weight": torch.ones(12, 37)})
    with pytest.raises(ckdiff.PairingError, match="lacks"):  # either could be meant
        UpdateMonitor(
            model,
            {**{k: v for k, v in state.items() if k != "up.bias"},
             "module.up.bias": torch.ones(37), "_orig_mod.up.bias": torch.ones(37)},
        )  # fmt: skip
    with pytest.raises(ckdiff.CheckpointError):
        UpdateMonitor(model, tmp_path / "nothing")


# arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every must be at least 1 step, not 0"),
        ({"every": True}, "every must be"),
        ({"rule": "nonsense"}, "cannot read the rule"),
        ({"watch": "nothing"}, "watch cannot be 'nothing'"),
        ({"keep": "disk"}, "keep cannot be 'disk'"),
    ],
)
def test_arguments_that_make_no_sense(options: Any, words: str) -> None:
    with pytest.raises(ckdiff.UsageError, match=words):
        UpdateMonitor(Tiny(), **options)


def test_models_that_cannot_be_watched() -> None:
    with pytest.raises(ckdiff.UsageError, match=r"must be a torch\.nn\.Module, not dict"):
        UpdateMonitor({})  # type: ignore[arg-type]
    with pytest.raises(ckdiff.CheckpointError, match="meta device"):
        UpdateMonitor(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ckdiff.CheckpointError, match="not initialised yet"):
        UpdateMonitor(nn.LazyLinear(3))
    sparse = Tied()
    sparse.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(ckdiff.CheckpointError, match=r"graph has the layout torch\.sparse_coo"):
        UpdateMonitor(sparse, watch="all")
    assert UpdateMonitor(sparse).look().elements == 24
    model = Tiny()
    model.up.weight.ds_shape = (37, 12)  # type: ignore[attr-defined]
    with pytest.raises(ckdiff.UsageError, match="ZeRO 3"):
        UpdateMonitor(model)

"""Keys that are numbers, lists of tensors, views that torch has not computed: nothing of a state
dict is passed over in silence, and nothing is read as what it is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import assert_same, read, saved

import ckdiff
from ckdiff.checkpoints.formats import statedicts, statevalues
from ckdiff.checkpoints.formats.pickledvalues import Storage, Tensor, walk
from ckdiff.checkpoints.formats.statewords import is_known
from ckdiff.checkpoints.formats.torchzip import chosen_weights, key_text, named_weights
from ckdiff.errors import CheckpointError

W, V = torch.arange(6.0).reshape(2, 3), torch.ones(4)
SD = {"l.0.w": W, "l.1.w": V}
#: contents, and the tensors in them by name
NUMBERED: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "numbers": ({0: W, 1: V}, {"0": W, "1": V}),
    "below zero": ({-1: W, 7: V}, {"-1": W, "7": V}),
    "numbers and names": ({"a": W, 0: V}, {"a": W, "0": V}),
    "under a key": ({"state_dict": {0: W, 1: V}, "epoch": 3}, {"0": W, "1": V}),
    "layers": ({"layers": {0: {"w": W}, 1: {"w": V}}}, {"layers.0.w": W, "layers.1.w": V}),
    "of models": ({0: SD, 1: {"w": V}}, {"0.l.0.w": W, "0.l.1.w": V, "1.w": V}),
    "a list": ({"params": [W, V]}, {"params.0": W, "params.1": V}),
    "a list beside": ({"a": W, "more": [V, None, W]}, {"a": W, "more.0": V, "more.2": W}),
    "numbers beside": ({"state_dict": {"a": W, "b": {3: V}}}, {"a": W, "b.3": V}),
    "a list beside parts": ({"a": {"w": W}, "noise": (V,)}, {"a.w": W, "noise.0": V}),
    "beside other things": ({"epoch": 3, "shadow": [W, V]}, {"0": W, "1": V}),
    "plain values between": ([W, 3, V], {"0": W, "2": V}),
}


@pytest.mark.parametrize("case", NUMBERED)
def test_numbers_are_names(case: str, tmp_path: Path) -> None:
    content, wanted = NUMBERED[case]
    assert_same(saved(content), wanted)
    torch.save(content, tmp_path / "a.pt")
    if not isinstance(content, list):  # in memory there is nothing but mappings
        found = ckdiff.diff(tmp_path / "a.pt", content).to_dict()
        assert (found["tensors"], found["tensors_identical"]) == (len(wanted),) * 2


def test_a_change_under_a_number_is_one(tmp_path: Path) -> None:
    for content in ({"a": W, 0: V}, {"a": W, "l": [V]}, {"state_dict": {"a": W, "b": {0: V}}}):
        torch.save(content, tmp_path / "a.pt")
        V[1] += 1
        torch.save(content, tmp_path / "b.pt")
        found = ckdiff.diff(tmp_path / "a.pt", tmp_path / "b.pt").to_dict()
        assert (found["elements"], found["rules"]["exact"]["changed"]) == (10, 1)


def test_what_has_names_goes_first() -> None:
    """Lists and numbers beside state dicts are no models, and a note says that they are there."""
    for more in ([V], {0: V}):
        table = read(saved({"net_g": SD, "noise": more, "epoch": 3}))
        assert (table.key, table.names) == ("net_g", list(SD))
        assert "left out: --key noise" in table.notes[1]
        table = read(saved({"model": SD, "extra": more}))
        assert (table.key, table.names) == ("model", list(SD))
        assert "left out: --key extra" in table.notes[1]
        with pytest.raises(CheckpointError, match=r"groups of tensors.*--key gen or --key disc"):
            read(saved({"gen": SD, "disc": SD, "noise": more, "epoch": 3}))
    with pytest.raises(CheckpointError, match="choose with --key gen or --key disc"):
        read(saved({"gen": SD, "disc": SD, "noise": [V]}))
    with pytest.raises(CheckpointError, match="choose with --key 0 or --key 1"):
        read(saved([SD, SD]))
    with pytest.raises(CheckpointError, match="two tensors have the name 0"):
        read(saved({0: W, "0": V}))


def test_models_under_known_keys_beside_each_other_are_several() -> None:
    for inner in ({"state_dict": SD}, {"model": {"w": W}}, {"module": {"a": {"w": W}}}):
        with pytest.raises(CheckpointError, match=r"--key actor\.\w+ or --key critic\.\w+"):
            read(saved({"actor": inner, "critic": inner | {}}))
    content = {"actor": {"state_dict": SD}, "critic": {"b.c": {"state_dict": SD}}}
    table = read(saved(content))
    assert (table.key, table.names) == ("actor.state_dict", list(SD))
    assert "left out: --key critic.b.c.state_dict" in table.notes[1]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"a": W, (0, 1): V}, "at a key"),
        ({"a": W, None: V}, "at a key"),
        ({"a": W, True: V}, "at True"),
        ({"a": W, "b": {(0, 1): V}}, "at b.a key"),
        ({"model": {"a": W, "b": [[V]]}}, "at 0.0"),
        ({"a": W, "b": {"c": [V, {"d": 1}]}}, "at c.0"),
    ],
)
def test_what_has_no_name_is_noted(content: Any, where: str) -> None:
    table = read(saved(content))
    assert table.names == ["a"]
    assert table.notes[-1].endswith(f"1 tensor in it is not compared, for want of a name: {where}")
    table = read(saved({**content, "losses": {None: [W[0], V[1:]]}, "metrics": [V]}))
    assert "3 tensors" in table.notes[-1] or table.key


def test_settings_and_optimizers_are_not_noted() -> None:
    state = {"state": {0: {"exp_avg": V}}, "param_groups": []}
    content = {"a": W, "b": W, "optimizer": state, "again": state, "hparams": {0: [V]}}
    assert read(saved(content)).notes == []
    content["tied"] = content["a"]
    assert read(saved(content)).notes == []


def test_what_is_shared_endlessly_is_looked_at_once() -> None:
    inner: list[Any] = [V, {None: V}]
    for _ in range(200):
        inner = [inner, inner]
    table = read(saved({"a": W, "b": inner}))
    assert table.names == ["a"]
    assert "1 tensor in it is not compared" in table.notes[-1]


VIEWS = {
    "conj": (lambda t: t.conj(), "conjugate"),
    "neg": (lambda t: t.conj().imag, "negative"),
    "parameter": (lambda t: torch.nn.Parameter(t.conj()), "conjugate"),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_that_are_not_computed_are_left_out(view: str, tmp_path: Path) -> None:
    """Their own elements are not in the file: those that are there would be wrong."""
    made, word = VIEWS[view]
    values = torch.randn(2, 3, dtype=torch.complex64)
    torch.save({"w": W, "v": made(values)}, tmp_path / "a.pt")
    table = read((tmp_path / "a.pt").read_bytes())
    assert (table.names, table.absent) == (["w"], ["v"])
    assert (
        f"v, a view that is not computed yet ({word}); save tensor.resolve_conj()"
        in (table.notes[0])
    )
    whole = made(values).detach().resolve_conj().resolve_neg()
    torch.save({"w": W, "v": whole}, tmp_path / "b.pt")
    assert_same((tmp_path / "b.pt").read_bytes(), {"w": W, "v": whole})
    for sides in (("a.pt", "b.pt"), ("b.pt", "a.pt"), ("a.pt", "a.pt")):
        result = ckdiff.diff(*(tmp_path / name for name in sides))
        assert result.unpaired["missing"] == ["v"]
        assert result.uncompared["tensors"] == 1
    torch.save({"v": made(values)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="v is a view that is not computed yet"):
        ckdiff.diff(tmp_path / "a.pt", tmp_path / "b.pt")


SHARED: dict[str, Any] = {
    "parts": lambda big, many, n: {f"p{i}": big for i in range(n)},
    "lists": lambda big, many, n: {f"p{i}": many for i in range(n)},
    "only entries": lambda big, many, n: {"e": 3, **{f"p{i}": {"x": big} for i in range(n)}},
    "keys that are no names": lambda big, many, n: {f"p{i}": {None: 1, 0: big} for i in range(n)},
    "entries with lists": lambda big, many, n: {"e": 3, **{f"p{i}": {"x": many} for i in range(n)}},
}


@pytest.mark.parametrize("case", SHARED)
def test_what_is_shared_is_looked_through_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle refers to what it has in two bytes: a small one has millions of entries, twice."""
    calls = 0

    def counted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args)

        return call

    for module, name in (
        (statedicts, "leads"), (statedicts, "label_of"), (statedicts, "mapping_of"),
        (statevalues, "is_tensor"), (statevalues, "label_of"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    tensor = Tensor(Storage("0", "float32", 4), "float32", 0, (4,), (1,))
    took = []
    for n in (100, 400):
        calls = 0
        statedicts.find(SHARED[case]({f"k{i}": tensor for i in range(n)}, [tensor] * n, n))
        took.append(calls)
    assert took[1] < 5 * took[0]


KEYS = st.sampled_from(
    ["a", "b.c", "w", "model", "ema", "state_dict", "net_g", "extra", "params", 0, 1, None]
)
LEAF = st.one_of(
    *[st.builds(lambda: Tensor(Storage("0", "float32", 4), "float32", 0, (4,), (1,)))] * 3,
    st.just(3),
)
TREES = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=4),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(content=TREES, trees=st.booleans())
def test_nothing_is_passed_over_in_silence(content: Any, trees: bool) -> None:
    try:
        path, chosen, notes = chosen_weights("f", content, None, trees=trees)
        named = named_weights(chosen, path, "f", key_text(path, None), notes)
    except CheckpointError:
        return
    said = any(map(is_known, path or ()))  # then what lies elsewhere is nobody's weights
    everything = {id(v) for v in walk(chosen if said else content) if type(v) is Tensor}
    taken = {id(tensor) for _, tensor in named}
    assert taken <= everything
    if taken != everything:
        assert any("left out" in note or "not compared" in note for note in notes), notes

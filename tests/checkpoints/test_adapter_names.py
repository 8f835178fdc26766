"""Adapters that somebody else wrote: which are merged into what, and which are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Tensor, write_safetensors

from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.views.adapter import AdapterView, adapt
from ckdiff.checkpoints.views.peft import read_config
from ckdiff.checkpoints.views.peftpatterns import Pattern, Steps
from ckdiff.errors import CheckpointError
from ckdiff.kernels.memory import bytes_at

_RANDOM = np.random.default_rng(5)
RANK, OUT, IN = 2, 6, 4


def f32(*shape: int, dtype: str = "F32") -> Tensor:
    data = _RANDOM.standard_normal(shape).astype(np.float32)
    return dtype, shape, data.tobytes()[: data.size * {"F32": 4, "BF16": 2, "I8": 1}[dtype]]


def factors(module: str, out: int = OUT, into: int = IN, rank: int = RANK) -> dict[str, Tensor]:
    prefix = f"base_model.model.{module}.lora_"
    return {f"{prefix}A.weight": f32(rank, into), f"{prefix}B.weight": f32(out, rank)}


def base(*modules: str, out: int = OUT, into: int = IN) -> dict[str, Tensor]:
    return {f"{module}.weight": f32(out, into) for module in modules}


@contextmanager
def opened(
    folder: Path,
    model: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    raw: bytes | None = None,
    **config: Any,
) -> Iterator[AdapterView]:
    write_safetensors(folder / "base" / "model.safetensors", model)
    write_safetensors(folder / "adapter" / "adapter_model.safetensors", adapter)
    text = json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 3, **config}).encode()
    (folder / "adapter" / "adapter_config.json").write_bytes(text if raw is None else raw)
    with open_checkpoint(folder / "base") as one, open_checkpoint(folder / "adapter") as two:
        yield adapt(one, two)


def refused(folder: Path, *given: Any, says: str, raw: bytes | None = None, **config: Any) -> None:
    with pytest.raises(CheckpointError) as caught, opened(folder, *given, raw, **config):
        pass
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# names


@pytest.mark.parametrize(
    ("stored", "in_memory"),
    [
        ("a.0.q", "a.0.q"),
        ("h.0.attn.q", "transformer.h.0.attn.q"),
        ("model.layers.0.q", "layers.0.q"),
        ("language_model.model.layers.0.q", "model.language_model.layers.0.q"),
        ("_orig_mod.module.a.q", "a.q"),
    ],
)
def test_prefixes_that_differ(tmp_path: Path, stored: str, in_memory: str) -> None:
    with opened(tmp_path, base(stored, "other.p"), factors(in_memory)) as view:
        assert view.merged == [f"{stored}.weight"]


def test_names_of_adapters_in_names_of_tensors(tmp_path: Path) -> None:
    given = factors("a.q")
    given = {name.replace(".weight", ".default.weight"): t for name, t in given.items()}
    with opened(tmp_path, base("a.q"), given) as view:
        assert view.merged == ["a.q.weight"]


def test_one_exchange_of_prefixes_has_to_fit_all(tmp_path: Path) -> None:
    given = factors("model.layers.0.q") | factors("model.layers.5.q")
    refused(tmp_path, base("x.layers.0.q", "x.layers.1.q"), given, says="has no tensor")


def test_no_layer_becomes_another(tmp_path: Path) -> None:
    refused(tmp_path, base("layers.3.q"), factors("layers.4.q"), says="'layers.4.q.weight'")


def test_what_could_be_two(tmp_path: Path) -> None:
    model = base("vision.layers.0.q", "text.layers.0.q")
    refused(tmp_path, model, factors("model.layers.0.q"), says="could be 'text.layers.0.q.weight'")


def test_two_modules_of_one_tensor(tmp_path: Path) -> None:
    given = factors("model.q") | factors("x.model.q")
    refused(tmp_path, base("model.q"), given, says="two modules change 'model.q.weight'")


def test_a_tied_head(tmp_path: Path) -> None:
    refused(
        tmp_path,
        base("embed_tokens"),
        factors("lm_head"),
        says="is the head tied to the embedding?",
    )


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"base_model.model.q.lora_magnitude_vector": f32(OUT)}, "is DoRA"),
        ({"base_model.model.q.lora_E": f32(2, 1)}, "is AdaLoRA"),
        (
            {"base_model.model.e.token_adapter.trainable_tokens_delta": f32(2, 4)},
            "trainable tokens",
        ),
        ({"base_model.model.q.base_layer.lora_A.weight": f32(2, 4)}, "LoRA of parameters"),
        ({"base_model.model.p.lora_A.weight": f32(2, 4)}, "'p' has no lora_B"),
        ({"base_model.model.q.lora_A.b.weight": f32(2, 4)}, "is there twice"),
        ({"base_model.model.q.lora_A.bias": f32(2)}, "is not a tensor of a LoRA adapter"),
        ({"base_model.model.q.lora_C.weight": f32(2)}, "is not a tensor of a LoRA adapter"),
        ({"base_model.model.new.weight": f32(2)}, "belongs to no tensor of base"),
        ({"base_model.model.q.bias": f32(OUT)}, "belongs to no tensor of base"),
        ({"base_model.model.p.weight": f32(3, 3)}, "does not fit"),
        ({"base_model.model.p.weight": f32(OUT, IN, dtype="I8")}, "is I8, and F32 in base"),
        ({"base_model.model.q.lora_B.bias": f32(OUT)}, "no tensor 'q.bias' to merge into"),
    ],
)
def test_tensors_that_are_not_used(tmp_path: Path, extra: dict[str, Tensor], says: str) -> None:
    refused(tmp_path, base("q", "p"), factors("q") | extra, says=says)


def test_a_vocabulary_that_grew_and_a_new_head(tmp_path: Path) -> None:
    given = factors("q") | {
        "base_model.model.embed_tokens.weight": f32(9, IN),
        "base_model.model.lm_head.weight": f32(9, IN),
        "base_model.model.score.modules_to_save.default.weight": f32(1, 3),
    }
    model = base("q", "embed_tokens")
    with opened(tmp_path, model, given, modules_to_save=["score"]) as view:
        shapes = dict(zip(view.table.names, view.table.shapes, strict=True))
        assert shapes == {
            "q.weight": (OUT, IN),
            "embed_tokens.weight": (9, IN),
            "lm_head.weight": (9, IN),
            "score.weight": (1, 3),
        }
        assert view.replaced == ["embed_tokens.weight", "lm_head.weight", "score.weight"]
        assert view.table.nbytes.tolist() == [96, 144, 144, 12]


# shapes


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 5), (6, 2)), ((2, 4), (7, 2)), ((2, 4), (6, 3)), ((2, 4, 1), (6, 2, 1)), ((8,), (12,))],
)
def test_matrices_that_do_not_fit(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    given = {"q.lora_A.weight": f32(*a), "q.lora_B.weight": f32(*b)}
    refused(tmp_path, base("q"), given, says="does not fit")


def test_another_rank_than_the_configuration_says(tmp_path: Path) -> None:
    refused(tmp_path, base("q"), factors("q"), r=3, says="has rank 2, and its configuration says 3")


def test_dtypes_that_nothing_is_added_to(tmp_path: Path) -> None:
    model = {"q.weight": f32(OUT, IN, dtype="I8")}
    refused(tmp_path, model, factors("q"), says="which is I8")
    given = factors("q") | {"base_model.model.q.lora_A.weight": f32(2, 4, dtype="I8")}
    refused(tmp_path, base("q"), given, says="is I8, not one of")


def merged(view: AdapterView, name: str) -> Any:
    tensor = view.table.names.index(name)
    size = int(view.table.nbytes[tensor])
    with closing(view.reader()) as reader:
        (address,) = reader.acquire(*(np.array([n]) for n in (tensor, 0, size))).tolist()
        found = bytes_at(address, size).view(np.float32).copy()
        reader.release()
    return found.reshape(view.table.shapes[tensor])


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("witness", ["same name", "another name", "none"])
def test_square_weights(tmp_path: Path, saved: bool, witness: str) -> None:
    """Whether they are transposed is told by those that are not square, or by the configuration."""
    model, given = base("0.q", out=4), factors("0.q", out=4)
    other = {"same name": "1.q", "another name": "1.p", "none": ""}[witness]
    if other:
        model |= {f"{other}.weight": f32(IN, OUT)}
        given |= factors(other)
    if witness == "another name" and not saved:
        refused(tmp_path, model, given, fan_in_fan_out=saved, says="'0.q' is square")
        return
    with opened(tmp_path, model, given, fan_in_fan_out=saved) as view:
        a, b, w = (
            np.frombuffer(data, np.float32).reshape(shape).astype(np.float64)
            for _, shape, data in (
                given["base_model.model.0.q.lora_A.weight"],
                given["base_model.model.0.q.lora_B.weight"],
                model["0.q.weight"],
            )
        )
        delta = (b @ a) * 1.5
        turned = saved if witness == "none" else True
        expected = w + (delta.T if turned else delta)
        np.testing.assert_allclose(merged(view, "0.q.weight"), expected, rtol=1e-5, atol=1e-6)


def test_nothing_in_tensors_of_no_elements(tmp_path: Path) -> None:
    with opened(tmp_path, base("q", out=0), factors("q", out=0)) as view:
        assert merged(view, "q.weight").shape == (0, IN)


# configurations


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"peft_type": "LORA"} x', "something follows"),
        (b'{"r": 8}', "no peft_type"),
        (b'{"peft_type": ["LORA"]}', "no peft_type"),
        (b'{"peft_type": "LORA", "peft_type": "LORA"}', "duplicate key"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b" " * (1 << 20), "more than"),
        (b"\xff", "not JSON"),
    ],
)
def test_files_that_are_no_configuration(raw: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_config(raw)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("peft_type", "IA3", "type 'IA3'"),
        ("peft_type", "ADALORA", "type 'ADALORA'"),
        ("use_dora", True, "DoRA"),
        ("use_dora", 1, "DoRA"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("target_parameters", ["experts.w"], "target_parameters"),
        ("trainable_token_indices", [1], "trainable tokens"),
        ("layer_replication", [[0, 1]], "layer replication"),
        ("init_lora_weights", "pissa", "'pissa'"),
        ("init_lora_weights", "pissa_niter_16", "'pissa_niter_16'"),
        ("init_lora_weights", "olora", "'olora'"),
        ("init_lora_weights", ["corda"], "corda"),
        ("use_tomorrow", True, "'use_tomorrow'"),
        ("r", True, "r is not"),
        ("r", 0, "r is not"),
        ("r", 1 << 20, "r is not"),
        ("r", 8.0, "r is not"),
        ("lora_alpha", "16", "lora_alpha is not"),
        ("lora_alpha", 1e39, "lora_alpha is not"),
        ("rank_pattern", [1], "rank_pattern is not"),
        ("rank_pattern", {"q": 0}, "rank_pattern is not"),
        ("alpha_pattern", {"q": None}, "alpha_pattern is not"),
        ("alpha_pattern", {"(": 1}, "cannot be used"),
        ("alpha_pattern", {"a)|(b": 1}, "cannot be used"),
        ("alpha_pattern", {"(?i)a": 1}, "cannot be used"),
        ("alpha_pattern", {"(?=a)a": 1}, "cannot be used"),
        ("alpha_pattern", {r"(a)\1": 1}, "cannot be used"),
        ("alpha_pattern", {"(" * 500 + ")" * 500: 1}, "nested too deeply"),
        ("alpha_pattern", {"((a{60}){60}){60}": 1}, "too long"),
        ("alpha_pattern", {"a" * 2000: 1}, "too long"),
        ("rank_pattern", {f"a{{{1900 + i}}}": 1 for i in range(50)}, "too long together"),
        ("bias", ["all"], "bias is not"),
        ("use_rslora", "yes", "use_rslora is not"),
        ("modules_to_save", "lm_head", "modules_to_save is not"),
        ("modules_to_save", ["a"] * 2000, "modules_to_save is not"),
    ],
)
def test_configurations_that_are_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(json.dumps({"peft_type": "LORA", field: value}).encode(), "x/adapter.json")
    assert str(caught.value).startswith("x/adapter.json: ")
    assert says in str(caught.value)


def test_no_configuration(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", base("q"))
    with open_checkpoint(tmp_path) as one, pytest.raises(CheckpointError, match="has no adapter_c"):
        adapt(one, one)


_PARTS = [
    "a",
    "b",
    ".",
    r"\.",
    "[ab]",
    "[^a.]",
    "(a|b)",
    "a*",
    "b+?",
    "(ab)?",
    ".*",
    "(a|ba)*",
    "^",
]
_PARTS += ["$", "a{2}", "(^a|b)", r"\d", r"\w+", "(?:a)", "(|a)*", "|", "a{0,2}", "1"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(_PARTS), max_size=6).map("".join), st.text("ab.1", max_size=8))
def test_patterns_match_as_those_of_peft_do(pattern: str, module: str) -> None:
    expected = re.match(rf"(.*\.)?({pattern})$", module) is not None
    assert Pattern(pattern, "x").matches(module, Steps()) == expected


def test_patterns_end() -> None:
    steps = Steps(100_000)
    assert not Pattern("(.*a)*(.*b)*(a|b|.*)*x", "x").matches("ab." * 3000, steps)
    assert steps.left > 0
    for pattern in ("a", "a+"):  # very many of them, or of modules
        few = Steps(100)
        with pytest.raises(CheckpointError, match="takes too long"):
            any(Pattern(pattern, "x").matches(f"b{i}", few) for i in range(1000))
    with pytest.raises(CheckpointError, match="takes too long"):
        Pattern("(.*a)*x", "x").matches("ab." * 100_000, Steps(100_000))

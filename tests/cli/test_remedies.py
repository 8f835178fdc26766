"""What delta, apply, graft, convert and info say: remedies that these commands have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import error, ok
from support import write_safetensors

import ckdiff

torch = pytest.importorskip("torch")

NOISE = np.random.default_rng(5)
ONE, OTHER = (NOISE.integers(0, 1 << 15, (4, 8), np.uint16) for _ in range(2))


def folder(path: Path, names: list[str], data: Any = ONE, *, rows: int = 4) -> Path:
    path.mkdir()
    more = np.resize(data, (rows, 8))
    tensors = {name: ("BF16", more.shape, more.tobytes()) for name in names}
    write_safetensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text('{"vocab_size": 4}')
    return path


def state(data: Any, prefix: str = "") -> dict[str, Any]:
    tensor = torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
    return {f"{prefix}a.weight": tensor, f"{prefix}b.weight": tensor.clone()}


def test_no_option_is_named_that_is_not_there(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", ["a.weight", "b.weight"])
    tuned = folder(tmp_path / "tuned", ["a.weight", "b.weight"], OTHER)
    ckdiff.diff(base, tuned, tmp_path / "m.zarr")
    torch.save(state(OTHER, "module."), tmp_path / "ddp.pt")
    lora = folder(tmp_path / "lora", ["a.lora_A.weight", "a.lora_B.weight"])
    (lora / "model.safetensors").rename(lora / "adapter_model.safetensors")
    given = str(tmp_path / "m.zarr")
    for other, says in ((tmp_path / "ddp.pt", "begin with 'module.'"), (lora, "merge_and_unload")):
        for said in (
            error("delta", str(base), str(other), "-o", str(tmp_path / "d")),
            error("graft", str(base), str(other), "--mask", given, "-o", str(tmp_path / "g")),
        ):
            assert says in said
            assert "--" not in said


def test_a_key_goes_where_a_message_asks_for_one(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", ["a.weight", "b.weight"])
    tuned, mask = tmp_path / "t.ckpt", str(tmp_path / "m.zarr")
    torch.save({"x": {"model": state(OTHER), "at": 1}, "y": {"model": state(ONE)}}, tuned)
    ckdiff.diff(base, tuned, mask, key="x.model")
    key, out = ("--key", "x.model"), str(tmp_path / "d")
    assert "--key" in error("delta", str(base), str(tuned), "-o", out)
    ok("delta", str(base), str(tuned), *key, "-o", out)
    ok("apply", str(base), out, "-o", str(tmp_path / "back/"))
    ok("graft", str(base), str(tuned), *key, "--mask", mask, "-o", str(tmp_path / "g"))
    for made in ("back", "g"):
        found = ckdiff.diff(tmp_path / made, tuned, key="x.model")
        assert found.rules["exact"]["changed"] == 0
    torch.save(
        {"x": {"model": state(ONE), "at": 1}, "y": {"model": state(OTHER)}}, tmp_path / "b.ckpt"
    )
    ok("apply", str(tmp_path / "b.ckpt"), out, *key, "-o", str(tmp_path / "back2"))
    asked = ("--base", str(tmp_path / "b.ckpt"), *key)
    ok("overlap", mask, mask, "--null", "magnitude", *asked)
    ok("check", out, *asked)
    ok("convert-delta", out, *asked, "--encoding", "indices", "-o", str(tmp_path / "i"))
    ok("export", mask, "--to", "indices", "-o", str(tmp_path / "m.safetensors"))
    ok("import", str(tmp_path / "m.safetensors"), *asked, "-o", str(tmp_path / "again.zarr"))
    for command in (("check", out), ("import", str(tmp_path / "m.safetensors"), "-o", "x.zarr")):
        assert "give the base" in error(*command, *key)


def test_masks_are_not_spread_over_what_is_no_safetensors(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", ["a.weight", "b.weight"])
    torch.save(state(OTHER), tmp_path / "t.pt")
    ckdiff.diff(base, tmp_path / "t.pt", tmp_path / "m.zarr")
    out = str(tmp_path / "out")
    said = error("export", str(tmp_path / "m.zarr"), "--like", str(tmp_path / "t.pt"), "-o", out)
    assert "ckdiff convert" in said


def test_a_slash_asks_for_a_directory(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", ["a.weight", "b.weight"])
    torch.save(state(OTHER), tmp_path / "sd.pt")
    made = tmp_path / "d"
    ckdiff.delta(base, tmp_path / "sd.pt", made)
    asked = {"slash": f"{tmp_path}/slash/", "there": str(tmp_path / "there")}
    (tmp_path / "there").mkdir()
    for name, out in asked.items():
        ok("apply", str(base), str(made), "-o", out)
        listed = sorted(path.name for path in (tmp_path / name).iterdir())
        assert listed == ["ckdiff-copied.json", "config.json", "model.safetensors"]
    ok("apply", str(base), str(made), "-o", str(tmp_path / "file"))
    weights = (tmp_path / "slash/model.safetensors").read_bytes()
    assert (tmp_path / "file").read_bytes() == weights
    ckdiff.delta(base, base / "model.safetensors", tmp_path / "d2")
    found = json.loads(ok("apply", str(base), str(tmp_path / "d2"), "--json", "-o",
                          f"{tmp_path}/one/").stdout)  # fmt: skip
    assert found["files"] == ["model.safetensors"]


def test_weight_versions_say_what_other_deltas_say(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", ["e"])
    tuned, stream = folder(tmp_path / "tuned", ["e"], OTHER), str(tmp_path / "s")
    ckdiff.delta(base, tuned, stream, encoding="xor")
    odd = base / "weights.v1.safetensors"
    odd.write_bytes((base / "model.safetensors").read_bytes())
    for file, name in ((base / "model.safetensors", "slash"), (odd, "there")):
        (tmp_path / "there").mkdir(exist_ok=True)
        out = f"{tmp_path}/slash/" if name == "slash" else str(tmp_path / "there")
        ok("apply", str(file), stream, "-o", out)
        listed = sorted(path.name for path in (tmp_path / name).iterdir())
        assert listed == ["ckdiff-copied.json", "config.json", file.name]
        assert ckdiff.diff(tmp_path / name, tuned).rules["exact"]["changed"] == 0
    ok("apply", str(odd), stream, "-o", str(tmp_path / "file"))
    assert (tmp_path / "file").is_file()
    grown = folder(tmp_path / "grown", ["e"], rows=6)  # its config is that of before
    ckdiff.delta(tuned, grown, stream, encoding="xor", full=True)
    said = ok("apply", str(base), stream, "-o", str(tmp_path / "out")).stderr
    assert "vocab_size 4" in said
    given = ("--config-from", str(grown))
    again = ok("apply", str(base), stream, *given, "-o", str(tmp_path / "out2"))
    assert "vocab_size" not in again.stderr
    torch.save(state(ONE), tmp_path / "sd.pt")
    torch.save(state(OTHER), tmp_path / "sd2.pt")
    ckdiff.delta(tmp_path / "sd.pt", tmp_path / "sd2.pt", tmp_path / "s2", encoding="overwrite")
    (tmp_path / "alone").mkdir()
    (tmp_path / "sd.pt").rename(tmp_path / "alone/sd.pt")
    said = ok("apply", str(tmp_path / "alone/sd.pt"), str(tmp_path / "s2"), "-o",
              f"{tmp_path}/new/").stderr  # fmt: skip
    assert "ckdiff: note: no config found" in said


def test_configs_that_contradict_or_are_not_there(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", ["e"])
    grown = folder(tmp_path / "grown", ["e"], rows=6)
    ckdiff.delta(base, grown, tmp_path / "d")
    said = ok("apply", str(base), str(tmp_path / "d"), "-o", str(tmp_path / "out")).stderr
    assert "vocab_size 4" in said
    assert "e has 6 rows" in said
    given = ("--config-from", str(grown))
    again = ok("apply", str(base), str(tmp_path / "d"), *given, "-o", str(tmp_path / "out2"))
    assert "vocab_size" not in again.stderr
    (tmp_path / "alone").mkdir()
    torch.save(state(ONE), tmp_path / "alone/sd.pt")
    said = ok("convert", str(tmp_path / "alone/sd.pt"), "-o", str(tmp_path / "c")).stderr
    assert "ckdiff: note: no config found" in said


def test_an_adapter_is_called_one(tmp_path: Path) -> None:
    lora = folder(tmp_path / "lora", ["a.lora_A.weight", "a.lora_B.weight"])
    assert "an adapter, 1 file" in ok("info", str(lora)).stdout
    assert "a checkpoint" in ok("info", str(folder(tmp_path / "m", ["a"]))).stdout


def test_what_is_stored_whole_because_it_is_fused_is_said(tmp_path: Path) -> None:
    parts = [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"]
    base = folder(tmp_path / "base", [*parts, "norm"])
    (tmp_path / "fused").mkdir()
    whole = np.concatenate([ONE, ONE, ONE])
    tensors = {"model.layers.0.self_attn.qkv_proj.weight": whole, "norm": ONE}
    raw = {name: ("BF16", data.shape, data.tobytes()) for name, data in tensors.items()}
    write_safetensors(tmp_path / "fused/model.safetensors", raw)
    said = ok("delta", str(base), str(tmp_path / "fused"), "-o", str(tmp_path / "d")).stderr
    assert "note: 1 tensor is stored whole" in said
    ok("apply", str(base), str(tmp_path / "d"), "-o", str(tmp_path / "back"))
    assert ckdiff.diff(tmp_path / "back", tmp_path / "fused").rules["exact"]["changed"] == 0
    said = ok("delta", str(base), str(base), "-o", str(tmp_path / "same")).stderr
    assert "whole" not in said


def test_an_adapter_that_brings_modules_whole_is_one(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", ["a.weight", "head.weight"])
    prefix = "base_model.model"
    names = [f"{prefix}.a.lora_A.weight", f"{prefix}.a.lora_B.weight", f"{prefix}.head.weight"]
    lora = folder(tmp_path / "lora", names)
    said = error("diff", str(base), str(lora))
    assert "adapter" in said
    assert json.loads(ok("info", str(lora), "--json").stdout)["adapter"] is True
    kept = [f"{prefix}.a.base_layer.weight", *names]  # a wrapped model, saved whole
    wrapped = folder(tmp_path / "wrapped", kept)
    assert "adapter" not in json.loads(ok("info", str(wrapped), "--json").stdout)


def test_a_component_is_found_in_a_pipeline(tmp_path: Path) -> None:
    names = ["conv_in.weight", "down.0.weight", "down.1.weight", "up.0.weight"]
    alone = folder(tmp_path / "unet", names)
    piped = folder(tmp_path / "pipe", [*(f"unet/{name}" for name in names), "vae/dec.weight"])
    assert "--rename '^unet/=' would pair 4 of 4" in error("diff", str(alone), str(piped))
    assert "--rename '^=unet/' would pair 4 of 4" in error("diff", str(piped), str(alone))


def test_a_key_that_is_mistyped(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    torch.save({"student": state(ONE), "teacher": state(OTHER)}, path)
    assert "did you mean --key teacher?" in error("info", str(path), "--key", "techer")
    torch.save({"epoch": 3, **state(ONE)}, path)
    assert "leave out --key" in error("info", str(path), "--key", "epoc")


def test_a_percentage_where_a_fraction_is_wanted(tmp_path: Path) -> None:
    base = str(folder(tmp_path / "base", ["a.weight"]))
    assert "30 % is 0.3" in error("diff", base, base, "--fail-above", "30")
    assert "%" not in error("diff", base, base, "--fail-above", "-1")

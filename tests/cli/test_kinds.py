"""Checkpoints as people have them, two at a time, through every command.

Each kind of trouble that public reports tell of has several examples here: what is counted must be
right, and every other command must do it or say in one line why not.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import error, ok, run, stopped
from every_command import Pair, counts, through
from safetensors.torch import save_file

State = dict[str, Any]

EMBED, QUERY = "model.embed_tokens.weight", "model.layers.0.q.weight"
EXPERTS = "model.layers.0.mlp.experts"
_NOISE = torch.Generator().manual_seed(5)


def noise(*shape: int) -> Any:
    return (torch.randn(shape, generator=_NOISE) / 50).bfloat16()


def moved(tensor: Any, elements: int = 1) -> Any:
    """A copy whose first elements have another lowest bit."""
    found = tensor.contiguous().clone()
    found.view(-1).view(torch.int16)[:elements] ^= 1
    return found


BASE = {QUERY: noise(4, 4), EMBED: noise(8, 4)}
TUNED = {name: moved(tensor) for name, tensor in BASE.items()}  # 2 of 48 elements
GROWN = {**TUNED, EMBED: torch.cat([TUNED[EMBED], noise(2, 4)])}


def tensors(path: Path, state: Mapping[str, Any], **more: Any) -> None:
    """A safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path, **more)


def saved(path: Path, content: Any) -> None:
    """A torch file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def index(path: Path, places: Mapping[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def wide(state: State) -> State:
    return {name: value.float() for name, value in state.items()}


def turned(state: State) -> State:
    """The same values, stored by columns."""
    return {name: value.mT.contiguous().mT for name, value in state.items()}


def renamed(state: State, old: str, new: str) -> State:
    return {name.replace(old, new): value for name, value in state.items()}


def experts() -> tuple[State, State]:
    """Per part and fused: 106 elements, of which 2 differ."""
    gate, up, down = ([noise(*s) for _ in range(2)] for s in ((3, 5), (3, 5), (5, 3)))
    other = {"model.layers.0.self_attn.o_proj.weight": noise(4, 4)}
    parts, fused = dict(other), dict(other)
    for i in range(2):
        for kind, held in (("gate", gate), ("up", up), ("down", down)):
            parts[f"{EXPERTS}.{i}.{kind}_proj.weight"] = held[i]
    both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    fused[f"{EXPERTS}.gate_up_proj"] = moved(torch.stack(both), 2)
    fused[f"{EXPERTS}.down_proj"] = torch.stack(down)
    return parts, fused


def pipeline(folder: Path, unet: State, vae: State, **more: State) -> None:
    """A diffusers pipeline with components in both formats."""
    kinds: State = {"_class_name": "X", "unet": ["diffusers", "U"], "safety_checker": [None, None]}
    tensors(folder / "unet/diffusion_pytorch_model.safetensors", unet)
    for name, state in ({"vae": vae} | more).items():
        kinds[name] = ["diffusers", "V"]
        saved(folder / name / "diffusion_pytorch_model.bin", state)
    (folder / "model_index.json").write_text(json.dumps(kinds))


def sharded(folder: Path, state: State, stem: str, suffix: str, **other: str) -> None:
    """A file for each tensor, and an index of them."""
    places = {}
    for i, (name, value) in enumerate(state.items(), 1):
        file = other.get(f"file{i}", f"{stem}-{i:05d}-of-{len(state):05d}{suffix}")
        write = tensors if suffix == ".safetensors" else saved
        write(folder / file, {name: value})
        places[name] = other.get(f"listed{i}", file)
    index(folder / other.get("index", f"{stem}{suffix}.index.json"), places)


def hub_cache(folder: Path, write: Callable[[Path, State], None], name: str, state: State) -> None:
    """What the hub's own client leaves."""
    write(folder / "blobs/abc", state)
    (folder / "snapshots/123").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("123")
    (folder / "snapshots/123" / name).symlink_to("../../blobs/abc")


class Lay:
    """Each lays ``a`` and ``b``, and gives the options, what is changed and compared, what is said.

    The last two are whether a delta and a graft have to be made: others may be refused.
    """

    Found = tuple[list[str], int, int, str, bool, bool]

    @staticmethod
    def torch_shards_and_safetensors(at: Path) -> Found:
        tensors(at / "a/model.safetensors", BASE)
        sharded(at / "b", TUNED, "pytorch_model", ".bin")
        return [], 2, 48, "", True, True

    @staticmethod
    def torch_index_that_names_less_and_more(at: Path) -> Found:
        tensors(at / "a/model.safetensors", BASE)
        saved(at / "b/pytorch_model-00001-of-00001.bin", {**TUNED, "stale": noise(3)})
        index(
            at / "b/pytorch_model.bin.index.json",
            dict.fromkeys(TUNED, "pytorch_model-00001-of-00001.bin"),
        )
        return [], 2, 48, "left out 1 tensor.*stale", True, True

    @staticmethod
    def narrow_torch_and_wide_safetensors(at: Path) -> Found:
        saved(at / "a/pytorch_model.bin", BASE)
        tensors(at / "b/model.safetensors", wide(TUNED))
        return [], 2, 48, "", False, False

    @staticmethod
    def index_with_a_dot_and_a_folder(at: Path) -> Found:
        for side, state in (("a", BASE), ("b", TUNED)):
            names = {"file1": "sub/one.safetensors", "listed1": "./sub/one.safetensors"}
            sharded(at / side, state, "model", ".safetensors", **names)
        return [], 2, 48, "", True, True

    @staticmethod
    def index_of_a_variant_beside_the_model(at: Path) -> Found:
        for side, state in (("a", BASE), ("b", TUNED)):
            tensors(at / side / "model.safetensors", state)
            names = {f"file{i}": f"model-{i:05d}-of-00002.fp16.safetensors" for i in (1, 2)}
            variant = {name: value.half() for name, value in state.items()}
            named = {"index": "model.safetensors.index.fp16.json"}
            sharded(at / side, variant, "model", ".safetensors", **names, **named)
        return [], 2, 48, "left out: .*fp16", True, True

    @staticmethod
    def only_a_variant(at: Path) -> Found:
        for side, state in (("a", BASE), ("b", TUNED)):
            sharded(at / side, state, "model.fp16", ".safetensors")
        return [], 2, 48, "", True, True

    @staticmethod
    def consolidated_torch_beside_the_model(at: Path) -> Found:
        for side, state in (("a", BASE), ("b", TUNED)):
            saved(at / side / "pytorch_model.bin", state)
            saved(at / side / "consolidated.00.pth", renamed(state, "model.", ""))
        return [], 2, 48, r"left out: consolidated\.00\.pth", True, True

    @staticmethod
    def adapter_beside_the_model(at: Path) -> Found:
        for side, state in (("a", BASE), ("b", TUNED)):
            tensors(at / side / "model.safetensors", state)
            saved(at / side / "adapter_model.bin", {"base_model.model.x.lora_A.weight": noise(2)})
        return [], 2, 48, "", True, True

    @staticmethod
    def hub_cache_folders(at: Path) -> Found:
        hub_cache(at / "a", saved, "pytorch_model.bin", BASE)
        hub_cache(at / "b", tensors, "model.safetensors", TUNED)
        return [], 2, 48, "", True, True

    @staticmethod
    def pipelines(at: Path) -> Found:
        pipeline(at / "a", BASE, {"enc.w": BASE[EMBED]})
        pipeline(at / "b", TUNED, {"enc.w": TUNED[EMBED]})
        return [], 3, 80, "", True, True

    @staticmethod
    def pipeline_without_a_component(at: Path) -> Found:
        same = {"enc.w": noise(3, 3)}
        pipeline(at / "a", BASE, same, text_encoder={"enc.w": noise(5)})
        pipeline(at / "b", TUNED, same)
        return [], 2, 57, "", True, True

    @staticmethod
    def grown_vocabulary_by_columns(at: Path) -> Found:
        saved(at / "a/pytorch_model.bin", turned(BASE))
        tensors(at / "b/model.safetensors", GROWN)
        return ["--common-rows"], 2, 48, "", True, True

    @staticmethod
    def shrunk_vocabulary_of_another_dtype(at: Path) -> Found:
        tensors(at / "a/model.safetensors", wide(GROWN))
        saved(at / "b/pytorch_model.bin", turned(BASE))
        return ["--common-rows"], 2, 48, "", False, False

    @staticmethod
    def fused_torch_by_columns(at: Path) -> Found:
        parts, fused = experts()
        tensors(at / "a/model.safetensors", parts)
        saved(at / "b/pytorch_model.bin", turned(fused))
        return [], 2, 106, "fused tensors of tuned compared as 6 parts", True, False

    @staticmethod
    def fused_wide_and_prefixed(at: Path) -> Found:
        parts, fused = experts()
        saved(at / "a/pytorch_model.bin", turned(parts))
        tensors(at / "b/model.safetensors", wide(renamed(fused, "model.", "model.language_model.")))
        rename = ["--rename", r"^model\.language_model\.=model."]
        return rename, 2, 106, "fused tensors of tuned compared as 6 parts", False, False

    @staticmethod
    def tied_by_shared_storage(at: Path) -> Found:
        tensors(at / "a/model.safetensors", BASE)
        saved(at / "b/pytorch_model.bin", {**TUNED, "lm_head.weight": TUNED[EMBED]})
        return [], 2, 48, "lm_head.weight.*same bits as model.embed_tokens.weight", True, True

    @staticmethod
    def tied_wide_and_grown(at: Path) -> Found:
        saved(at / "a/pytorch_model.bin", wide({**GROWN, "lm_head.weight": GROWN[EMBED]}))
        tensors(at / "b/model.safetensors", BASE)
        return ["--common-rows"], 2, 48, "lm_head.weight.*only in base.*tied", False, False

    @staticmethod
    def lightning_and_a_model(at: Path) -> Found:
        tensors(at / "a/model.safetensors", BASE)
        state = {f"net.{name}": value for name, value in TUNED.items()}
        optimizer = {"state": {0: {"exp_avg": noise(3, 3)}}, "param_groups": []}
        saved(
            at / "b/epoch=1-step=20.ckpt",
            {"epoch": 1, "state_dict": state, "optimizer_states": [optimizer], "loops": {}},
        )
        return ["--rename", "^net[.]="], 2, 48, "under state_dict", False, False

    @staticmethod
    def average_beside_the_model(at: Path) -> Found:
        optimizer = {"state": {}, "param_groups": [{"lr": 1}]}
        saved(at / "a/x.pt", {"model": TUNED, "ema": BASE, "optimizer": optimizer})
        saved(at / "b/x.pt", {"ema": TUNED, "model": BASE})
        return ["--key", "ema"], 2, 48, "", True, True

    @staticmethod
    def trainer_step(at: Path) -> Found:
        for side, state in (("a", BASE), ("b", TUNED)):
            tensors(at / side / "model.safetensors", state)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
                saved(at / side / name, {"state": {0: noise(3)}, "param_groups": []})
        return [], 2, 48, "", True, True

    @staticmethod
    def placeholders_of_some(at: Path) -> Found:
        tensors(at / "a/model.safetensors", BASE)
        saved(at / "b/pytorch_model.bin", {**TUNED, EMBED: torch.zeros(0)})
        return [], 1, 16, "1 tensor is empty in tuned.*ZeRO-3", True, True


KINDS = [name for name in vars(Lay) if name[0].islower()]


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind: str, tmp_path: Path) -> None:
    options, changed, elements, says, delta, graft = getattr(Lay, kind)(tmp_path)
    pair = Pair(tmp_path / "a", tmp_path / "b", options)
    said = counts(pair, changed, elements)
    assert re.search(says, said), said
    (tmp_path / "w").mkdir()
    made = through(pair, tmp_path / "w")
    assert made["delta"] or not delta
    assert made["graft"] or not graft


def test_strided_shared_and_empty_tensors(tmp_path: Path) -> None:
    def state(matrix: Any) -> State:
        return {
            "t": matrix.t(), "steps": matrix[::2, 1:], "shared": matrix[1:3], "same": matrix,
            "one": torch.full((1,), 3.0).expand(7, 3), "none": torch.zeros(0, 3),
            "scalar": torch.tensor(3), "bool": torch.tensor([True, False]),
        }  # fmt: skip

    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    tuned = base.clone()
    tuned[2, 3] += 1
    saved(tmp_path / "a.pt", state(base))
    saved(tmp_path / "b.pt", state(tuned))
    tensors(tmp_path / "c.safetensors", state(tuned))
    for i, (one, other) in enumerate(
        (("a.pt", "b.pt"), ("a.pt", "c.safetensors"), ("c.safetensors", "a.pt"))
    ):
        pair = Pair(tmp_path / one, tmp_path / other)
        counts(pair, 4, 94)
        (tmp_path / f"w{i}").mkdir()
        assert through(pair, tmp_path / f"w{i}") == {"delta": True, "graft": True}


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    tensors(tmp_path / "a/model.safetensors", BASE)
    runs = tmp_path / "run"
    for step in (500, 1000):
        tensors(runs / f"checkpoint-{step}/model.safetensors", TUNED)
    saved(runs / "checkpoint-500/optimizer.pt", {"state": {}, "param_groups": []})
    saved(tmp_path / "zero/pytorch_model.bin", {name: torch.zeros(0) for name in BASE})
    saved(tmp_path / "two.pt", [{"model": BASE}, {"model": TUNED}])
    torch.save(BASE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    tensors(tmp_path / "p/model.safetensors", renamed(TUNED, "model.", "model.text."))
    wanted = {
        "run": r"checkpoint-500, checkpoint-1000 \(give one of them; did you mean .*-1000\?",
        "run/checkpoint-500/optimizer.pt": "holds training state",
        "zero": "ZeRO-3.*gather",
        "two.pt": r"--key 0\.model or --key 1\.model",
        "old.pt": r"torch before 1\.6 \(save it again",
        "p": r"--rename '\^model\\\.text\\\.=model\.' would pair 2 of 2",
        "nowhere": "does not exist",
    }
    for given, says in wanted.items():
        for sides in ((tmp_path / "a", tmp_path / given), (tmp_path / given, tmp_path / "a")):
            line = error("diff", *map(str, sides))
            if given != "p" or sides[0].name == "a":
                assert re.search(says, line), line


def test_a_tied_head_fails_no_gate_whatever_became_of_the_embedding(tmp_path: Path) -> None:
    saved(tmp_path / "a.pt", BASE)
    saved(tmp_path / "b.pt", {**GROWN, QUERY: BASE[QUERY], "lm_head.weight": GROWN[EMBED]})
    sides = str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
    # that it grew fails one
    found = error_of_gate(*sides, "--fail-above", "1")
    assert "1 of 2 tensors" in found
    assert EMBED in found
    assert "lm_head" not in found
    ok("diff", *sides, "--common-rows", "--fail-above", "1")


def error_of_gate(*arguments: str) -> str:
    """The line of the gate that failed."""
    done = run("diff", *arguments)
    assert done.exit_code == 1, done.output
    (line,) = (line for line in done.stderr.splitlines() if " gate " in line)
    return line


def _resumable(at: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Sides, and what makes two runs of them different ones."""
    parts, fused = experts()
    tensors(at / "per.safetensors", {**parts, "model.w": noise(5, 5)})
    saved(at / "fused.pt", {**turned(fused), "model.w": noise(5, 5)})
    saved(at / "base.pt", {"model": BASE, "ema": BASE})
    saved(at / "tuned.pt", {"model": TUNED, "ema": BASE})
    for name in ("one", "two"):
        tensors(at / f"{name}.safetensors", {"m.q": BASE[QUERY], "m.k": TUNED[QUERY]})
    exchange = [word for rule in ("q$=t", "k$=q", "t$=k") for word in ("--rename", rule)]
    experts_of, keyed, two = (
        [str(at / name) for name in names]
        for names in (
            ("per.safetensors", "fused.pt"),
            ("base.pt", "tuned.pt"),
            ("one.safetensors", "two.safetensors"),
        )
    )
    return {
        "unfuse": (experts_of, ["--no-unfuse"]),
        "key": ([*keyed, "--key", "model"], ["--key", "ema"]),
        "exchange": (two, exchange),
    }


@pytest.mark.parametrize("what", ["unfuse", "key", "exchange"])
def test_killed_and_resumed_by_the_same_options_only(what: str, tmp_path: Path) -> None:
    sides, other = _resumable(tmp_path)[what]
    wanted = json.loads(ok("diff", *sides, *other, "--json").stdout)["rules"]
    for more, again in (([], True), (other, False)):
        out = str(tmp_path / f"{len(more)}.zarr")
        stopped(signal.SIGKILL, "diff", *sides, "-o", out)
        done = ok("diff", *sides, *more, "-o", out, "--json")
        assert ("resuming: 1 of 1" in done.stderr) == again, done.stderr
        if more:
            assert json.loads(done.stdout)["rules"] == wanted
        ok("check", out)

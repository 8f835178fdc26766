"""Config files beside weights: which are copied, from where, and what --overwrite makes of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import error, ok, python
from hub_server import only_hub
from support import write_safetensors

import ckdiff
from ckdiff.checkpoints import open_checkpoint
from ckdiff.outputs import companionnames, companions
from ckdiff.outputs.cleaning import clean
from ckdiff.outputs.companionnames import RECORD, is_companion
from ckdiff.outputs.companions import Copying

COPIED = [
    "config.json", "generation_config.json", "preprocessor_config.json", "adapter_config.json",
    "config_sentence_transformers.json", "modules.json", "model_index.json", "params.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3",
    "tekken.json", "qwen.tiktoken", "spiece.model", "source.spm", "vocab.json", "vocab.txt",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "modeling_x.py", "1_Pooling/config.json", "vocab-src.json",
    "scheduler/scheduler_config.json", "additional_chat_templates/tool_use.jinja",
]  # fmt: skip
LEFT = [
    "README.md", "LICENSE", "notes.txt", ".env", ".config.json", "x.ipynb", "optimizer.pt",
    "training_args.bin", "trainer_state.json", "scheduler.pt", "model.safetensors.index.json",
    "rng_state.pth", "ds_config.json", "training_config.json", "id_rsa", "data.json", RECORD,
    "events.out", "run.sh", "../config.json", "/config.json", "a/b/config.json", ".git/config.json",
    "a/x.py", "config.json/", "config.json\n", "cönfig.json", "x.model/config.json", "_config.json",
    "tokenizer" + "x" * 200 + ".json",
]  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint with a config and a tokenizer."""
    folder = tmp_path / "base"
    write_safetensors(folder / "model.safetensors", {"w": ("F32", (4,), bytes(range(16)))})
    (folder / "config.json").write_text('{"dtype": "float32"}')
    (folder / "tokenizer.json").write_bytes(b"x" * 3_000_000)
    (folder / "README.md").write_text("mine")
    return folder


def converted(base: Path, **more: Any) -> tuple[Path, list[str], list[str]]:
    """The output, what it says that it copied, and the notes."""
    out, notes = base.parent / "out", list[str]()
    observer = ckdiff.Observer(note=notes.append)
    made = ckdiff.convert(base, out, observer=observer, **more)
    return out, made.copied, notes


def test_which_names_are_copied() -> None:
    assert [name for name in COPIED if not is_companion(name)] == []
    assert [name for name in LEFT if is_companion(name)] == []


def test_what_lies_beside_is_copied_and_listed(base: Path) -> None:
    for name in (*COPIED, "README.md", "training_args.bin", ".env"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    (base / "config.json").write_text('{"auto_map": {}}')
    (base / "model_index.json").unlink()  # this is no pipeline
    out, copied, notes = converted(base)
    assert sorted(copied) == sorted(set(COPIED) - {"model_index.json"})
    assert notes == []
    for name in copied:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {*copied, "model.safetensors", RECORD}
    assert sorted(json.loads((out / RECORD).read_text())["files"]) == sorted(copied)


def test_code_comes_along_only_where_a_config_names_it(base: Path) -> None:
    (base / "setup.py").write_text("print()")
    assert "setup.py" not in converted(base)[1]
    (base / "tokenizer_config.json").write_text('{"auto_map": {}}')
    assert "setup.py" in converted(base, overwrite=True)[1]


def test_links_that_lead_out_are_not_followed(base: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (base / "vocab.json").symlink_to(secret)
    (base / "merges.txt").symlink_to("config.json")
    (base / "tokenizer.model").symlink_to("nowhere")
    os.mkfifo(base / "added_tokens.json")
    (base / "additional_chat_templates").symlink_to(tmp_path)
    (tmp_path / "x.jinja").write_text("secret")
    out, copied, notes = converted(base)
    assert sorted(copied) == ["config.json", "merges.txt", "tokenizer.json"]
    assert not (out / "merges.txt").is_symlink()
    assert sum("link that leads out" in note for note in notes) == 2
    assert any("added_tokens.json" in note and "named pipe" in note for note in notes)
    assert not any(b"secret" in path.read_bytes() for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("forged", ["", "blob", "blobs"])
def test_a_snapshot_in_the_hubs_cache(base: Path, tmp_path: Path, forged: str) -> None:
    top = tmp_path / "models--a--b"
    snapshot = top / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "1234").write_text("secret")
    base.rename(snapshot)
    if forged == "blobs":
        (top / "blobs").symlink_to(tmp_path / "secret")
    else:
        (top / "blobs").mkdir()
        blob = top / "blobs" / "1234"
        if forged:
            blob.symlink_to(tmp_path / "secret" / "1234")
        else:
            blob.write_text("vocabulary")
    (snapshot / "vocab.json").symlink_to("../../blobs/1234")
    made = ckdiff.convert(snapshot, tmp_path / "out")
    assert ("vocab.json" in made.copied) is not bool(forged)


def test_sizes_are_bounded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(base / "spiece.model", "wb") as file:
        file.truncate(companionnames.MOST_BYTES + 1)
    for i in range(300):
        (base / f"config_{i}.json").write_text("{}")
    _, copied, notes = converted(base)
    assert "spiece.model" not in copied
    assert len(copied) <= companionnames.MOST_FILES
    assert any("more than 256 config files" in note for note in notes)
    for i in range(300):
        (base / f"config_{i}.json").unlink()
    monkeypatch.setattr(companions, "MOST_IN_ALL", 1000)
    _, copied, notes = converted(base, overwrite=True)
    assert "tokenizer.json" not in copied
    assert any("tokenizer.json is not copied" in note for note in notes)


def test_config_from_and_none(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "vocab.txt").write_text("a")
    assert converted(base, config_from=other)[1] == ["vocab.txt"]
    out, copied, _ = converted(base, config=False, overwrite=True)
    assert copied == []
    assert os.listdir(out) == ["model.safetensors"]
    for wrong, said in (("nowhere", "not a directory"), ("empty", "holds no config")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        arguments = ["convert", str(base), "-o", str(tmp_path / "x")]
        assert said in error(*arguments, "--config-from", str(tmp_path / wrong))
    assert not (tmp_path / "x").exists()


def test_a_delta_brings_none(base: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    write_safetensors(tuned / "model.safetensors", {"w": ("F32", (4,), bytes(16))})
    (tuned / "config.json").write_text("tuned's")
    ckdiff.delta(base, tuned, tmp_path / "delta")
    ckdiff.diff(base, tuned, tmp_path / "s.zarr")
    commands: list[list[str]] = [
        ["apply", str(base), str(tmp_path / "delta")],
        ["graft", str(base), str(tuned), "--mask", str(tmp_path / "s.zarr")],
    ]
    for command in commands:
        out = tmp_path / command[0]
        for options, wanted in (
            ([], (base / "config.json").read_text()),
            (["--config-from", str(tuned)], "tuned's"),
        ):
            done = ok(*command, "-o", str(out), "--overwrite", "--json", *options)
            assert "config.json" in json.loads(done.stdout)["copied"]
            assert (out / "config.json").read_text() == wanted
        done = ok(*command, "-o", str(out), "--overwrite", "--json", "--no-config")
        assert json.loads(done.stdout)["copied"] == []
        assert os.listdir(out) == ["model.safetensors"]


def test_the_folder_that_trainers_of_ranks_write(base: Path, tmp_path: Path) -> None:
    inner = base / "huggingface"
    inner.mkdir()
    (base / "config.json").rename(inner / "config.json")
    (inner / "vocab.json").write_text("{}")
    assert sorted(converted(base)[1]) == ["config.json", "vocab.json"]
    inner.rename(tmp_path / "elsewhere")
    inner.symlink_to(tmp_path / "elsewhere")
    assert converted(base, overwrite=True)[1] == ["tokenizer.json"]


def test_an_output_that_is_one_file_has_nothing_beside_it(base: Path, tmp_path: Path) -> None:
    file = base / "model.safetensors"
    tuned = write_safetensors(tmp_path / "t.safetensors", {"w": ("F32", (4,), bytes(16))})
    ckdiff.delta(file, tuned, tmp_path / "delta")
    made = ckdiff.apply(file, tmp_path / "delta", tmp_path / "rebuilt.safetensors")
    assert made.copied == []
    assert (tmp_path / "rebuilt.safetensors").read_bytes() == tuned.read_bytes()
    with pytest.raises(ckdiff.UsageError, match="is one file"):
        ckdiff.apply(file, tmp_path / "delta", tmp_path / "again.safetensors", config_from=base)


def test_beside_a_single_file(base: Path, tmp_path: Path) -> None:
    made = ckdiff.convert(base / "model.safetensors", tmp_path / "out")
    assert made.copied == ["config.json", "tokenizer.json"]


# --overwrite


def test_copies_are_replaced_and_nothing_else(base: Path, tmp_path: Path) -> None:
    out, _, _ = converted(base)
    (base / "config.json").write_text('{"new": 1}')
    (base / "tokenizer.json").unlink()
    assert converted(base, overwrite=True)[1] == ["config.json"]
    assert (out / "config.json").read_text() == '{"new": 1}'
    assert not (out / "tokenizer.json").exists()
    before = (out / RECORD).read_bytes()

    def refused(why: str) -> None:
        with pytest.raises(ckdiff.OutputError, match=why):
            converted(base, overwrite=True)

    (out / "config.json").write_text('{"new": 2}')
    refused("config.json, which is no longer as it was copied")
    (out / "config.json").write_text('{"new": 1}')
    (out / "vocab.json").write_text("mine")
    refused("vocab.json, which is not part of a checkpoint")
    (out / "vocab.json").unlink()
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(base / "config.json")
    refused("config.json, which is not part")
    (out / "config.json").unlink()
    (out / RECORD).unlink()
    (out / "config.json").write_text('{"new": 1}')
    refused("config.json, which is not part")
    (out / RECORD).write_bytes(before)
    converted(base, overwrite=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record["files"].update({"thesis.txt": record["files"]["config.json"]}),
        lambda record: record.update(version=2),
        lambda record: record.update(files=[]),
        lambda record: record.update(files={"config.json": 5}),
        lambda record: record["files"]["config.json"].update(size="20"),
    ],
)
def test_a_record_that_is_not_ours(base: Path, spoil: Callable[[Any], Any]) -> None:
    out, _, _ = converted(base)
    record = json.loads((out / RECORD).read_text())
    spoil(record)
    (out / RECORD).write_text(json.dumps(record))
    with pytest.raises(ckdiff.OutputError, match="not part of a checkpoint"):
        converted(base, overwrite=True)
    (out / RECORD).write_text("[" * 100_000)
    with pytest.raises(ckdiff.OutputError, match="not part of a checkpoint"):
        converted(base, overwrite=True)


def test_leftovers_with_companions_are_cleaned(base: Path, tmp_path: Path) -> None:
    for name in COPIED:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text('{"auto_map": 1}')
    (base / "model_index.json").unlink()
    killed = python(
        "import os, sys, ckdiff\n"
        "from ckdiff.outputs.rebuilt import Rebuilt\n"
        "Rebuilt.write = lambda *arguments: os.kill(os.getpid(), 9)\n"
        "ckdiff.convert(*sys.argv[1:])\n",
        str(base), str(tmp_path / "out"),
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    assert [path.name for path in clean(tmp_path).removed] == ["out.ckdiff-partial"]
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_before_it_is_copied(base: Path) -> None:
    with open_checkpoint(base) as checkpoint:
        found = Copying().beside(checkpoint, directory=True)
    (base / "config.json").write_text("other")
    (file,) = (file for file in found.files if file.name == "config.json")
    with pytest.raises(ckdiff.SourceChanged, match=r"config\.json: changed"):
        list(file.parts())


# what a config says


def test_the_dtype_of_a_config(base: Path) -> None:
    said = {
        "torch_dtype": "torch.float32", "text_config": {"dtype": "float16", "x": [1.5, None]},
        "quantization_config": {"dtype": "float32"}, "dtype": "auto", "é": "é",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(said))
    out, _, notes = converted(base, dtype="bf16")
    said["torch_dtype"], said["text_config"]["dtype"] = "torch.bfloat16", "bfloat16"  # type: ignore[index]
    assert json.loads((out / "config.json").read_text("utf-8")) == said
    assert "config.json says bfloat16 now" in notes
    for raw in (b'{"dtype":   "bfloat16"}', b"{", b"[1]", b"\xff", b"[" * 100_000):
        (base / "config.json").write_bytes(raw)
        converted(base, dtype="bf16", overwrite=True)
        assert (out / "config.json").read_bytes() == raw


# the hub


def test_companions_of_a_model_on_the_hub(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    with only_hub(tmp_path, monkeypatch) as hub:
        hub.put("org/model", {**files, "sub/config.json": b"{}", "notes.txt": b"no"})
        out = tmp_path / "out"
        line = ok("convert", "hf://org/model", "-o", str(out)).stdout.splitlines()[-1]
        assert "; copied config.json, tokenizer.json" in line
        for name in ("config.json", "tokenizer.json"):
            assert (out / name).read_bytes() == files[name]
        assert {"notes.txt", "README.md", "sub/config.json"}.isdisjoint(hub.fetched())
        folder = hub.put("org/sub", {f"x/{name}": data for name, data in files.items()})
        made = ckdiff.convert(f"hf://org/sub@{folder}/x", tmp_path / "sub")
        assert made.copied == ["config.json", "tokenizer.json"]
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        notes: list[str] = []
        observer = ckdiff.Observer(note=notes.append)
        made = ckdiff.convert("hf://org/model", tmp_path / "offline", observer=observer)
        assert made.copied == []
        assert any("no config files are copied" in note for note in notes)

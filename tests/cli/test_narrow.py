"""Tables on a terminal of 60 columns and more: names stay apart, numbers stay whole."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from cli_support import ok
from hypothesis import given
from hypothesis import strategies as st
from support import Tensor, write_safetensors

from ckdiff.cli.shortening import shortened, text_width
from ckdiff.cli.tables import Column, table
from ckdiff.cli.terminal import Terminal

WIDTHS = (60, 80, 100, 120)
LONG = "language_model.decoder.transformer_blocks"


def names(layers: int = 3, experts: int = 3) -> list[str]:
    """A mixture of experts: long names that differ in several places, and wide characters."""
    found = [f"{LONG}.embed_tokens.weight", "視覺.編碼器.的.很長很長的.名字.零.權重", "norm"]
    for layer in (*range(layers), 10, 110):
        found += [f"{LONG}.{layer}.self_attention.{part}_proj.weight" for part in "qko"]
        for expert in (*range(experts), 17, 117):
            before = f"{LONG}.{layer}.mlp.experts.{expert}"
            found += [f"{before}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
    return found


def checkpoint(folder: Path, seed: int, share: float = 0.3) -> str:
    """Of every tensor about ``share`` moved by one; of each seed other ones."""
    draw, tensors = np.random.default_rng(seed), dict[str, Tensor]()
    for i, name in enumerate(names()):
        values = np.random.default_rng(1000 + i).integers(0x3C00, 0x3F80, (32, 16), np.uint16)
        if seed:
            values += (draw.random((32, 16)) < share).astype(np.uint16)
        tensors[name] = "BF16", (32, 16), values.tobytes()
    if seed == 1:
        tensors[f"{LONG}.0.added_{seed}.weight"] = "BF16", (4,), bytes(8)
    folder.mkdir(parents=True)
    return str(write_safetensors(folder / "model.safetensors", tensors).parent)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where things are, by what they are."""
    root = tmp_path_factory.mktemp("narrow")
    found = {"base": checkpoint(root / "base", 0)}
    for seed in (1, 2, 3):
        found[f"t{seed}"] = checkpoint(root / f"experiment-with-a-long-name-{seed}" / "out", seed)
        found[f"s{seed}"] = str(
            root / f"masks-of-an-experiment-with-a-long-name-{seed}" / "out.zarr"
        )
        Path(found[f"s{seed}"]).parent.mkdir()
        rules = ("--rule", "exact", "--rule", "atol=1e-5", "--rule", "ulp=1", "--stats")
        ok("diff", found["base"], found[f"t{seed}"], "-o", found[f"s{seed}"], *rules)
    found["stream"] = str(root / "stream")
    for a, b in (("base", "t2"), ("t2", "t3")):
        xor = ("--encoding", "xor", "-o", found["stream"])
        ok("delta", found[a], found[b], *xor)
    found["run"] = str(root / "run.timeline")
    return found


COMMANDS = [
    "show s1 --by tensor",
    "show s1 --by layer",
    "show s1 --by module",
    "diff base t1 --stats --rule atol=1e-5 --rule exact",
    "overlap s1 s2 --by tensor --top 50",
    "overlap s1 s2 s3 --by tensor --top 50 --null tensor --null model",
    "overlap s1 s2 s3 s1 s2 s3 s1 s2 s3 --by module",
    "structure s1 s2 --top 100",
    "spectrum base t1 --angles 2 --all",
    "spectrum base t1 --dry-run",
    "timeline base t1 t2 -o run --by tensor --overwrite",
    "info stream",
]


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    for key, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("COLUMNS", str(width))


def rows_of(text: str) -> list[str]:
    """The lines that are rows of a table: cells with two blanks between them."""
    return [line for line in text.splitlines() if re.search(r"\S {2,}\S", line)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("line", COMMANDS)
def test_tables_fit(
    line: str, width: int, made: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch, width)
    text = ok(*(made.get(word, word) for word in line.split())).stdout
    rows = rows_of(text)
    assert rows
    assert [row for row in rows if text_width(row) > width] == []
    broken = [line for line in text.splitlines() if text_width(line) > width and " " in line]
    assert broken == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_tensor_can_be_told_from_the_others(
    width: int, made: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch, width)
    lines = ok("show", made["s1"], "--by", "tensor").stdout.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("tensor ")]
    for head in heads:  # a part of the table each
        called = [re.split(r"  +", line)[0] for line in lines[head + 1 :][: len(names())]]
        assert len(set(called)) == len(names())
    assert f"{512 * len(names()):,}" in "\n".join(lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_never_break(
    width: int, made: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = ok("show", made["s1"], "--by", "module").stdout
    numbers = re.findall(r"[\d,]*\d\.\d\d %|\d{1,3}(?:,\d{3})+", wide)
    on_terminal(monkeypatch, width)
    text = ok("show", made["s1"], "--by", "module").stdout
    shown = set(re.findall(r"[\d,]*\d\.\d\d %|\d{1,3}(?:,\d{3})+", text))
    assert set(numbers) <= shown


def test_a_pipe_gets_names_whole(made: dict[str, str]) -> None:
    text = ok("show", made["s1"], "--by", "tensor").stdout
    assert all(name in text for name in names())


def test_huge_names_stay_apart_in_a_pipe() -> None:
    heads = [Column("name", "left", flexible=True), Column("n")]
    rows = [["x" * 400 + f"{i:03}" + "y" * 400, "1"] for i in range(30)]
    lines = table(heads, rows, Terminal())
    assert len(set(lines)) == 31
    assert max(map(len, lines)) <= 204


def test_abbreviated_names_keep_their_numbers() -> None:
    found = dict(zip(names(), shortened(names(), 24), strict=True))
    for name, short in found.items():
        if ".experts." in name:
            layer, expert = re.findall(r"\.(\d+)", name)
            assert re.search(rf"\b{layer}\b.*\b{expert}\b", short), (name, short)
    assert found["norm"] == "norm"


@given(
    st.lists(
        st.text(st.sampled_from("ab.0層1/_"), max_size=40), min_size=1, max_size=40, unique=True
    ),
    st.integers(8, 30),
)
def test_what_differs_looks_different(texts: list[str], width: int) -> None:
    found = shortened(texts, width)
    assert len(set(found)) == len(texts)
    assert all(text_width(text) <= width for text in found)
    assert all(a == b for a, b in zip(texts, found, strict=True) if text_width(a) <= width)


def test_one_text_looks_the_same_everywhere() -> None:
    texts = ["model.layers.1.a.weight", "model.layers.2.a.weight"] * 3
    found = shortened(texts, 10)
    assert found == found[:2] * 3


def test_columns_are_never_lost_but_optional_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch, 40)
    heads = [Column("name", "left", flexible=True), *(Column(f"n{i}") for i in range(9))]
    heads.append(Column("bar", optional=True))
    rows = [
        [f"a.long.name.{k}" * 3, *(f"{k + i:,}" for i in range(1000, 1009)), "██"] for k in (1, 2)
    ]
    lines = table(heads, rows, Terminal(io.StringIO()))
    assert all(len(line) <= 40 for line in lines)
    text = "\n".join(lines)
    assert all(f"n{i}" in text and f"{1001 + i:,}" in text for i in range(9))
    assert "bar" not in text

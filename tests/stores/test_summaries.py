"""Grouping by layer and module, sums, sorting, and the map of densities."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest

from ckdiff.cli.formats import cosine, duration, name, percent, rate, shorten
from ckdiff.cli.heatmap import heat_map
from ckdiff.cli.tables import Column, table, text_width
from ckdiff.cli.terminal import Terminal
from ckdiff.errors import UsageError
from ckdiff.naming import natural_key
from ckdiff.stores.summaries import (
    By,
    columns,
    layer_of,
    module_of,
    relative_delta,
    stacks,
    summarise,
)
from ckdiff.stores.table import MaskTable, Statistics


def make_table(
    tensors: dict[str, tuple[int, int]], dtypes: dict[str, str] | None = None
) -> MaskTable:
    """A table of ``name -> (elements, changed)``, in natural order, with two rules."""
    names = sorted(tensors, key=natural_key)
    elements = np.array([tensors[n][0] for n in names], np.int64)
    changed = np.array([tensors[n][1] for n in names], np.int64)
    return MaskTable(
        names,
        [(dtypes or {}).get(n, "BF16") for n in names],
        [(int(count),) for count in elements],
        elements,
        np.cumsum(elements) - elements,
        {"atol=1e-5": changed // 2, "exact": changed},
        ["0" * 32] * len(names),
        ["1" * 32] * len(names),
    )


def model(layers: int = 12) -> MaskTable:
    """A small mixture of experts."""
    tensors = {"model.embed_tokens.weight": (1000, 10), "model.norm.weight": (8, 0)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = (8, layer % 2)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = (640, 64 + layer)
        tensors[f"{prefix}.self_attn.q_proj.bias"] = (8, 1)
        for expert in range(3):
            tensors[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = (256, 10 * expert)
    return make_table(tensors, {"model.norm.weight": "F32"})


@pytest.mark.parametrize(
    ("tensor", "layer", "module"),
    [
        ("model.layers.7.self_attn.q_proj.weight", "model.layers.7", "self_attn.q_proj"),
        ("model.layers.7.mlp.experts.31.up_proj.weight", "model.layers.7", "mlp.experts.*.up_proj"),
        ("model.layers.12.norm.weight", "model.layers.12", "norm"),
        ("lm_head.weight", "lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("transformer.h.0.attn.c_attn.bias", "transformer.h.0", "attn.c_attn"),
        ("0.weight", "0", "weight"),
        ("blocks.3.scale", "blocks.3", "scale"),
        ("conv1.weight", "conv1.weight", "conv1.weight"),
        ("layers.٣.w", "layers.٣.w", "layers.٣.w"),  # only ASCII digits are integers
        ("", "", ""),
    ],
)
def test_layer_and_module(tensor: str, layer: str, module: str) -> None:
    assert layer_of(tensor) == layer
    assert module_of(tensor) == module


@pytest.mark.parametrize("by", ["tensor", "layer", "module", "dtype", "model"])
def test_counts_add_up(by: By) -> None:
    source = model()
    rows = summarise(source, by)
    assert sum(row["elements"] for row in rows) == source.total_elements
    for rule, counts in source.changed.items():
        assert sum(row["rules"][rule]["changed"] for row in rows) == counts.sum()
    for row in rows:
        found = row["rules"]["exact"]
        assert found["density"] == found["changed"] / row["elements"]
        assert list(row["rules"]) == ["atol=1e-5", "exact"]


def test_groups_by_hand() -> None:
    rows = {row["group"]: row for row in summarise(model(3), "module")}
    assert list(rows) == [
        "input_layernorm",
        "mlp.experts.*.up_proj",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "self_attn.q_proj",
    ]
    assert rows["mlp.experts.*.up_proj"]["elements"] == 3 * 3 * 256
    assert rows["mlp.experts.*.up_proj"]["rules"]["exact"]["changed"] == 3 * (0 + 10 + 20)
    assert rows["self_attn.q_proj"]["rules"]["exact"]["changed"] == 64 + 65 + 66 + 3
    dtypes = {row["group"]: row["elements"] for row in summarise(model(3), "dtype")}
    assert dtypes == {"BF16": model(3).total_elements - 8, "F32": 8}


def test_layers_are_in_natural_order() -> None:
    layers = [row["group"] for row in summarise(model(12), "layer")]
    inner = [layer for layer in layers if layer.startswith("model.layers.")]
    assert inner == [f"model.layers.{i}" for i in range(12)]


def test_empty_tensors_have_density_zero() -> None:
    rows = summarise(make_table({"empty": (0, 0), "full": (4, 4)}), "tensor")
    assert [row["rules"]["exact"]["density"] for row in rows] == [0.0, 1.0]


def test_sort_and_top() -> None:
    source = model()
    exact = [row["rules"]["exact"]["changed"] for row in summarise(source, sort="changed:exact")]
    assert exact == sorted(exact, reverse=True)
    first = summarise(source, sort="density")  # the first rule
    densities = [row["rules"]["atol=1e-5"]["density"] for row in first]
    assert densities == sorted(densities, reverse=True)
    assert summarise(source, sort="density", top=3) == first[:3]
    assert summarise(source, top=3) == first[:3]
    assert summarise(source, sort="density:atol=0.00001") == first
    by_name = summarise(source, "tensor", sort="name")
    assert by_name == summarise(source, "tensor")
    assert len(summarise(source, top=10_000)) == len(first)


@pytest.mark.parametrize("sort", ["nonsense", "density:ulp=3", "changed:", "shape", "cosine"])
def test_unknown_columns_are_refused_with_those_there_are(sort: str) -> None:
    with pytest.raises(UsageError) as failure:
        summarise(model(), "layer", sort=sort)
    assert "density:atol=1e-5" in failure.value.one_line()


def test_unknown_groupings_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot group"):
        summarise(model(), "nonsense")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="top"):
        summarise(model(), top=0)


def with_statistics() -> MaskTable:
    source = make_table({"a.0.w": (4, 2), "a.1.w": (4, 1), "b": (8, 8)})
    source.statistics = Statistics(
        sum_abs_delta=np.array([1.0, 2.0, 0.0]),
        l2_delta=np.array([3.0, 4.0, 0.0]),
        max_abs_delta=np.array([0.5, 0.25, 0.0]),
        l2_base=np.array([6.0, 8.0, 0.0]),
        l2_tuned=np.array([6.0, 8.0, 0.0]),
        dot=np.array([36.0, 64.0, 0.0]),
        sign_flips=np.array([1, 2, 0]),
        nonfinite=np.array([0, 1, 0]),
        ulp_histogram=[[0, 2], [1, 0, 3], []],
        defined=np.array([True, True, False]),
    )
    return source


def test_statistics_of_groups() -> None:
    source = with_statistics()
    (row,) = summarise(source, "model")
    found = row["statistics"]
    assert found["l2_delta"] == 5.0
    assert found["l2_base"] == 10.0
    assert found["max_abs_delta"] == 0.5
    assert found["cosine"] == 1.0
    assert (found["sign_flips"], found["nonfinite"]) == (3, 1)
    assert found["ulp_histogram"] == [1, 2, 3]
    assert relative_delta(row) == 0.5
    layers = summarise(source, "layer", sort="relative_delta")
    assert [row["group"] for row in layers] == ["a.0", "a.1", "b"]  # b has no numeric meaning
    assert "statistics" not in layers[-1]
    assert relative_delta(layers[-1]) is None
    assert "ulp_histogram" not in {column.name for column in columns(source, "layer")}


def test_statistics_that_overflow_are_null() -> None:
    source = with_statistics()
    assert source.statistics is not None
    source.statistics.l2_delta[0] = 1e200
    source.statistics.dot[0] = np.inf
    (row,) = summarise(source, "model")
    assert row["statistics"]["l2_delta"] is None
    assert row["statistics"]["cosine"] == 1.0 or row["statistics"]["cosine"] is None
    assert relative_delta(row) is None


# the map


def draw(
    source: MaskTable, monkeypatch: pytest.MonkeyPatch, width: int = 100, colour: bool = False
) -> list[str]:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    if colour:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", "1")
    found = stacks(source, "exact")
    return [line for stack in found for line in heat_map(stack, Terminal(io.StringIO()), "exact")]


def cells(line: str) -> str:
    return line.split("│")[1]


def test_the_map_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"m.layers.{i}.up.weight": (1000, 100 * i) for i in range(9)}
    tensors |= {f"m.layers.{i}.extra.weight": (1000, 800) for i in (0, 10)}
    tensors |= {"m.layers.10.up.weight": (1000, 800)}
    assert draw(make_table(tensors), monkeypatch) == [
        "m.layers: exact density by module and layer",
        "       0  1  2  3  4  5  6  7  8  10",
        "extra │███                        ███│   80.00 %",
        "up    │···▁▁▁▂▂▂▃▃▃▄▄▄▅▅▅▆▆▆▇▇▇██████│   44.00 %",
        "       · 0 %   10 % ▁▂▃▄▅▆▇█ 80 %",
    ]


def test_the_map_of_80_layers_and_10_modules_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        f"model.layers.{i}.block.module_{m}.weight": (1000, (i * m) % 400)
        for i in range(80)
        for m in range(10)
    }
    source = make_table(tensors)
    wide = draw(source, monkeypatch, 120)
    assert max(map(len, wide)) <= 120
    assert len(wide) == 13
    assert all(len(cells(line)) == 80 for line in wide[2:12])
    narrow = draw(source, monkeypatch, 80)
    assert max(map(len, narrow)) <= 80
    assert "2 layers to a column" in narrow[0]
    assert all(len(cells(line)) == 40 for line in narrow[2:12])
    for width in (40, 60):
        assert max(len(line) for line in draw(source, monkeypatch, width)[2:12]) <= width


def test_merged_cells_add_counts_not_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"l.{i}.m.w": (10 if i % 2 else 990, 10 if i % 2 else 0) for i in range(190)}
    lines = draw(make_table(tensors), monkeypatch, 60)  # 43 columns: 5 layers to each
    assert cells(lines[2]) == "▁█" * 19
    assert lines[2].endswith(" 1.00 %")
    assert lines[-1].endswith("1.49 %")  # 30 of 2010, not a mean of 0 and 1


def test_the_map_of_one_layer_and_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    one = draw(make_table({"l.0.a.w": (100, 50), "l.0.b.w": (100, 0), "head": (9, 9)}), monkeypatch)
    assert [cells(line) for line in one[2:4]] == ["███", "···"]
    assert draw(make_table({"a.weight": (10, 5), "b": (10, 5)}), monkeypatch) == []


def test_the_map_of_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = draw(make_table({f"l.{i}.a.w": (100, 0) for i in range(4)}), monkeypatch)
    assert cells(lines[2]) == "············"
    assert lines[-1].strip() == "· 0 %"


def test_a_wide_range_of_densities_is_logarithmic(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"l.{i}.a.w": (10**8, 10**i) for i in range(9)}
    lines = draw(make_table(tensors), monkeypatch)
    drawn = cells(lines[2])
    assert drawn == "".join(sorted(drawn))
    assert len(set(drawn)) >= 6  # linear, all but two would look like nothing
    assert lines[-1].endswith("(logarithmic)")


def test_many_modules_are_cut_to_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"l.{i}.m{m}.w": (100 + m, m) for i in range(2) for m in range(40)}
    lines = draw(make_table(tensors), monkeypatch)
    assert any("16 smaller modules" in line for line in lines)
    assert any(line.startswith("m39") for line in lines)
    assert not any(re.match(r"m1\b", line) for line in lines)


def test_colours_only_add_to_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    source = model()
    plain, coloured = draw(source, monkeypatch), draw(source, monkeypatch, colour=True)
    assert plain != coloured
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured] == plain


def test_hostile_layer_names(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = "9" * 5000  # more than int() takes
    tensors = {f"\x1b[31m.{digits}.[red]x.w": (10, 1), "\x1b[31m.1.[red]x.w": (10, 1)}
    text = "\n".join(draw(make_table(tensors), monkeypatch))
    assert "\x1b" not in text
    assert "\\x1b[31m" in text
    assert "[red]x" in text


# tables and numbers


def test_percent() -> None:
    assert percent(0, 7) == "0 %"
    assert percent(7, 7) == "100 %"
    assert percent(0, 0) == "0 %"
    assert percent(1, 3) == "33.33 %"
    assert percent(1, 10**6) == "0.0001 %"
    assert percent(10**6 - 1, 10**6) == "99.9999 %"
    assert percent(10**12 - 1, 10**12).startswith("99.9999999999")


def test_numbers() -> None:
    assert [rate(n, 1) for n in (0, 999, 1000, 999_600, 26e9, 3e15)] == [
        "0 B/s", "999 B/s", "1 kB/s", "1 MB/s", "26 GB/s", "3e+03 TB/s",
    ]  # fmt: skip
    assert rate(34.4e9, 2) == "17.2 GB/s"
    assert rate(1, 0) == "0 B/s"
    assert [duration(s) for s in (0.42, 12.3, 200, 3900)] == [
        "0.42 s", "12 s", "3 min 20 s", "1 h 5 min",
    ]  # fmt: skip
    assert [cosine(c) for c in (None, 1.0, 1 - 4.2e-6, 0.5)] == ["-", "1", "1-4.2e-06", "0.5000"]


def test_names_are_shortened_in_the_middle() -> None:
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert shorten("abc", 3) == "abc"
    assert len(name("x" * 1_000_000)) <= 200


def test_tables_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    heads = [Column("name", "left", flexible=True), Column("n"), Column("bar", optional=True)]
    rows = [["n" * 60, "1,000", "█" * 10], ["層" * 30, "2", ""]]
    lines = table(heads, rows, Terminal(io.StringIO()))
    assert all(text_width(line) <= 40 for line in lines)
    assert "bar" not in lines[0]
    assert [text_width(line) for line in lines] == [40, 40, 40]
    monkeypatch.delenv("FORCE_COLOR")
    lines = table(heads, rows, Terminal(io.StringIO()))
    assert "n" * 60 in lines[1]

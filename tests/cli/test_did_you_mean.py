"""A word that is mistyped is answered with the one that was meant: of each kind of words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_support import error, ok, write_pair
from commands import command_names

from ckdiff.errors import RuleError, nearest, one_of
from ckdiff.rules import Rule


def meant(*arguments: str) -> str | None:
    found = re.search(r"[Dd]id you mean '?([^'? ]+)'?\?", error(*arguments))
    return None if found is None else found[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_pair(root)
    pair = str(root / "base.safetensors"), str(root / "tuned.safetensors")
    ok("diff", *pair, "-o", str(root / "seed.zarr"))
    (root / "checkpoints" / "step").mkdir(parents=True)
    (root / "deltas").mkdir()
    ok("delta", *pair, "-o", str(root / "deltas" / "one.delta"))
    return root


@pytest.mark.parametrize("name", command_names())
def test_commands(name: str) -> None:
    if len(name) > 4:
        assert meant(name[:2] + name[3:]) == name
        assert meant(name + "s") == name
    assert meant("zzzzzz") is None


def test_options() -> None:
    assert "'--include'" in error("diff", "a", "b", "--includ", "x")
    assert meant("overlap", "a", "b", "--requiresame-base") == "--require-same-base"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["overlap", "a", "b", "--null", "magnitud"], "magnitude"),
        (["overlap", "a", "b", "--null", "row-col"], "rowcol"),
        (["show", "a", "--by", "modul"], "module"),
        (["export", "a", "-o", "x", "--to", "safetensor"], "safetensors"),
        (["export", "a", "-o", "x", "--to", "TORCHE"], "torch"),
        (["delta", "a", "b", "-o", "x", "--encoding", "overwrit"], "overwrite"),
        (["diff", "a", "b", "--device", "cdua"], "cuda"),
        (["--log-level", "debg", "info", "a"], "debug"),
        (["convert", "a", "-o", "b", "--dtype", "bf61"], "bf16"),
    ],
)
def test_choices(arguments: list[str], word: str) -> None:
    assert meant(*arguments) == word
    assert "is not one of" in error(*arguments)


def test_what_the_api_checks(made: Path) -> None:
    store = str(made / "seed.zarr")
    out = ("-o", str(made / "x.zarr"))
    for word, given in (
        ("intersection", "intersect"),
        ("union", "unoin"),
        ("difference", "diffrence"),
    ):
        assert meant("combine", given, store, store, *out) == word
    assert meant("show", store, "--sort", "elemnts") == "elements"
    pair = [str(made / f"{side}.safetensors") for side in ("base", "tuned")]
    assert meant("diff", *pair, "--rule", "exakt") == "exact"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("exakt", "exact"), ("exacct@bf16", "exact@bf16"), ("atoll=1e-5", "atol=1e-5"),
        ("atol 1e-5", "atol=1e-5"), ("rtol:1e-3", "rtol=1e-3"), ("ulp1", "ulp=1"),
        ("ulps=4@bf61", "ulp=4@bf16"), ("exact@flaot16", "exact@float16"),
    ],
)  # fmt: skip
def test_rules(text: str, rule: str) -> None:
    with pytest.raises(RuleError, match=re.escape(f"did you mean {rule}? rules are exact,")):
        Rule.parse(text)
    Rule.parse(rule)


@pytest.mark.parametrize(
    "text", ["nope", "1e-5", "", "tol=1e-5", "exact=1", "atol", "=" * 10_000, "a" * 10**6]
)
def test_what_is_like_no_rule(text: str) -> None:
    with pytest.raises(RuleError) as caught:
        Rule.parse(text)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "wrong", "right"),
    [
        ("show {}", "sead.zarr", "seed.zarr"),
        ("check {}", "seed.zar", "seed.zarr"),
        ("structure {}", "seedzarr", "seed.zarr"),
        ("overlap {} {}", "seed.zrar", "seed.zarr"),
        ("export {} -o x.npz", "sed.zarr", "seed.zarr"),
        ("random --like {} --seed 1 -o x.zarr", "SEED.zarr", "seed.zarr"),
        ("random --like={} --seed 1 -o x.zarr", "seed.zar", "seed.zarr"),
        ("graft base.safetensors tuned.safetensors --mask {} -o x", "seed.zar", "seed.zarr"),
        ("diff base.safetensor tuned.safetensors", "base.safetensor", "base.safetensors"),
        ("diff base.safetensors {}", "tunde.safetensors", "tuned.safetensors"),
        ("info {}", "checkpoint/step", "checkpoints/step"),
        ("apply base.safetensors {} -o x", "deltas/one.dleta", "deltas/one.delta"),
        ("apply base.safetensors {} -o x", "delta/one.delta", "deltas/one.delta"),
        ("clean {}", "checkpiont", "checkpoints"),
        ("import {} -o x.zarr", "base.safetensor", "base.safetensors"),
        ("report {} -o x.html", "seed.zar", "seed.zarr"),
    ],
)  # fmt: skip
def test_paths(
    command: str, wrong: str, right: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    assert meant(*command.format(wrong, wrong).split()) == right
    absolute = command.format(str(made / wrong), str(made / wrong)).split()
    if "{}" in command:
        assert meant(*absolute) == str(made / right)


def test_what_is_not_there_at_all(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert meant("show", "qqq") is None
    assert meant("show", "qqq/www") is None
    assert "ckdiff diff -o makes one" in error("show", "qqq")


def test_words() -> None:
    assert nearest("atol", ["atol", "rtol"]) == "atol"
    assert nearest("tol", ["atol", "rtol"]) is None, "both are as near"
    assert nearest("sym", ["symmetric-difference", "union"]) == "symmetric-difference"
    assert nearest("x" * 10**6, ["union"]) is None
    assert one_of("unoin", ["union", "both"]) == "did you mean union? one of union, both"
    assert one_of("zzz", ["union", "both"]) == "one of union, both"

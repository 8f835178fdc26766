"""Verdicts, on results that are made up so that one thing at a time is so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import example_programs  # noqa: F401  # makes the programs importable
import pytest
from paper.build import write_json
from paper.claims import CAVEAT, FAILS, HOLDS, UNTESTED, everywhere_sparse
from paper.claims_ablated import ABLATED, little_effect, ticket
from paper.claims_masked import CLAIMS, same_weights, suffices
from paper.results import Results, course, load_results
from paper.retrain import FULL
from paper.takehome import box


def made(name: str, **changed: Any) -> dict[str, Any]:
    """A run's result: what is not said is usual, and it gained .1."""
    run = {
        "name": name,
        "group": "main",
        "algorithm": name.partition("-")[0],
        "task": "sort",
        "precision": "f32",
        "optimizer": "adamw",
        "lr": 1e-6,
        "mask": "",
        "of": "",
        "start": "base",
    }
    usual = {"density": 0.2, "reward": 0.6, "near": 0.95, "tolerant": 0.9}
    value = {key: changed.pop(key, each) for key, each in usual.items()}
    equal = {"exact": 0.1, "atol=1e-8": 0.1, "atol=1e-5": value["near"], "atol=1e-4": 1.0}
    scores = {"accuracy": 0.5, "reward": value["reward"]}
    start = {"accuracy": 0.5, "reward": 0.5}
    more = {key: changed.pop(key) for key in ("kl", "clip_fraction") if key in changed}
    return {
        "run": run | changed,
        "start": {"stored": start, "masters": start},
        "end": {"stored": scores, "masters": scores},
        "curve": [{"step": 1, "stored": scores}],
        "kl": 1.0,
        "clip_fraction": 0.1,
        "gradient_clipped": 1.0,
        "measured": {
            "density": {"exact": value["density"], "atol=1e-5": value["density"]},
            "density_f32": {"exact": 1.0, "atol=1e-5": value["tolerant"], "atol=1e-4": 0.0},
            "like_full": {"masters": equal, "stored": equal},
            "steps": [{"density": value["density"], "coverage": 1.0}],
        },
        **more,
    }


def results_of(runs: Iterable[dict[str, Any]]) -> Results:
    return Results({}, {each["run"]["name"]: each for each in runs}, {"questions": {}}, {}, {})


def ablations(**densities: float) -> Results:
    return results_of(
        made(f"grpo-sort-1-{name}", group="ablation", density=value)
        for name, value in densities.items()
    )


def test_sparse_everywhere_is_judged_by_every_run_that_learnt() -> None:
    main, other = made("grpo-sort-1"), made("dpo-sort-1-sgd", group="sgd")
    assert everywhere_sparse(results_of([main, other])).verdict == HOLDS
    dense = made("dpo-sort-1-sgd", group="sgd", density=0.6)
    assert everywhere_sparse(results_of([main, dense])).verdict == CAVEAT
    assert everywhere_sparse(results_of([made("grpo-sort-1", density=0.6)])).verdict == FAILS
    idle = made("dpo-sort-1", density=0.6, reward=0.55)
    assert everywhere_sparse(results_of([main, idle])).verdict == HOLDS, "it learnt nothing"
    assert everywhere_sparse(results_of([idle])).verdict == UNTESTED


@pytest.mark.parametrize(("there", "verdict"), [(0.22, HOLDS), (0.3, FAILS)])
def test_an_ablation_is_held_against_its_own_counterpart(there: float, verdict: str) -> None:
    """Clipping is taken away from runs of several epochs, which move more than those of one."""
    results = ablations(on=0.9, epochs=0.2, **{"epochs-noclip": there})
    found = little_effect("epochs-noclip")(results)
    assert found.verdict == verdict
    assert list(found.rows[0][1:3]) == [f"{there:.3f}", "0.200"]


def test_an_ablation_that_learns_less_is_shown_beside_the_others_on_their_way() -> None:
    on, off = (made(f"grpo-sort-1-{name}", group="ablation") for name in ("on", "off"))
    off["curve"][0]["stored"] = {"accuracy": 0.5, "reward": 0.55}
    (row,) = little_effect("off")(results_of([on, off])).rows
    assert row[3] == "0.100", "half of the density where half was gained"


def test_an_ablation_of_what_was_not_at_work_is_vacuous() -> None:
    found = ablations(on=0.2, off=0.21, **{"kl.1": 0.2})
    assert little_effect("kl.1")(found).verdict == HOLDS
    found.runs["grpo-sort-1-on"]["kl"] = 0.001
    told = little_effect("kl.1")(found)
    assert told.verdict == UNTESTED
    assert str(told.rows[0][-1]).endswith(": **vacuous**")
    assert little_effect("off")(found).verdict == HOLDS
    assert little_effect("small")(found).verdict == UNTESTED, "not run"


def test_every_ablation_of_the_claims_has_a_counterpart() -> None:
    from paper.ablations import ABLATIONS

    assert {*ABLATED, "on", "epochs"} == {*ABLATIONS, "kl.1-lr1e-06"}


def tickets(kept: float, drawn: float) -> Results:
    full = made("grpo-sort-1")
    more = [
        made(f"t-{kind}", group="ticket", mask=kind, of="grpo-sort-1", reward=0.5 + 0.1 * share)
        for kind, share in (("kept", kept), ("drawn", drawn))
    ]
    return results_of([full, *more])


@pytest.mark.parametrize(
    ("kept", "drawn", "verdict"),
    [(0.95, 0.3, HOLDS), (0.95, 0.92, CAVEAT), (0.95, 1.5, CAVEAT), (0.5, 1.0, FAILS)],
)
def test_a_ticket_wins_only_where_a_random_one_does_not(
    kept: float, drawn: float, verdict: str
) -> None:
    assert ticket("kept", control="drawn")(tickets(kept, drawn)).verdict == verdict


def test_a_ticket_at_a_larger_rate_is_held_against_all_weights_at_that_rate() -> None:
    runs = [
        made("grpo-sort-1"),
        made("grpo-sort-1-lr1e-05", group="sweep", lr=1e-5, reward=0.9),
        made("t", group="ticket", mask="percent", of="grpo-sort-1", lr=1e-5, reward=0.7),
        made("u", group="ticket", mask="percent", of="grpo-sort-1", lr=1e-4, reward=0.9),
    ]
    found = ticket("percent")(results_of(runs))
    assert found.verdict == FAILS
    assert [row[-1] for row in found.rows] == ["50%", "no full run"]


def retrained(own: float, drawn: float, **more: Any) -> Results:
    runs = [made(FULL[0], **more)]
    for kind, share in (("own", own), ("random1", drawn)):
        reward = 0.5 + 0.1 * share
        name = f"{FULL[0]}+{kind}"
        runs.append(made(name, group="retrain", mask=kind, of=FULL[0], reward=reward))
    return results_of(runs)


@pytest.mark.parametrize(
    ("own", "drawn", "verdict"), [(0.98, 0.5, HOLDS), (0.98, 0.95, FAILS), (0.5, 0.1, FAILS)]
)
def test_a_mask_suffices_only_beyond_a_random_one(own: float, drawn: float, verdict: str) -> None:
    assert suffices(retrained(own, drawn)).verdict == verdict


@pytest.mark.parametrize(("moved", "verdict"), [(0.9, HOLDS), (0.02, FAILS)])
def test_weights_are_recovered_only_beyond_the_untrained_base(moved: float, verdict: str) -> None:
    found = same_weights(retrained(1.0, 0.5, tolerant=moved))
    assert found.verdict == verdict
    assert found.rows[0][2] == f"{1 - moved:.3f}"


def test_nothing_is_judged_without_runs_and_the_box_says_so() -> None:
    empty = results_of([])
    found = [claim.judge(empty) for claim in CLAIMS]
    assert {each.verdict for each in found} == {UNTESTED}
    assert f"**Of {len(CLAIMS)} sentences** {len(CLAIMS)} cannot be tested here." in box(
        empty, found
    )


def test_gains_along_a_run_are_counted_from_the_same_prompts(tmp_path: Path) -> None:
    often = {"sort": {"stored": {"accuracy": 0.5, "reward": 0.52}}}
    write_json(tmp_path / "base.json", {"often": often})
    write_json(tmp_path / "agreement.json", {})
    write_json(tmp_path / "setting.json", {})
    write_json(tmp_path / "a.json", made("grpo-sort-1"))
    write_json(tmp_path / "b.json", made("t-kept", start="pruned"))
    runs = load_results(tmp_path).runs
    assert course(runs["a"])[0]["gained"] == pytest.approx(0.08)
    assert course(runs["b"])[0]["gained"] == pytest.approx(0.1), "it began elsewhere"

"""A small matrix from nothing to the page: trained, measured, compared, reported."""

from __future__ import annotations

import argparse
import dataclasses
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from example_programs import NAMES, one_thread, small_setting  # noqa: F401
from paper.build import load_weights, read_json, write_json
from paper.commands import collect
from paper.report import write_report
from paper.results import Results, density_at, load_results, share_of_gain, spread
from paper.runs import of, small_matrix
from paper.train import Session, Setting
from paper.work import AGREEMENT, Job, is_done, jobs_of, work
from sentences import sentences, words

import ckdiff


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Every job of the small matrix that is in NAMES, done."""
    found = small_setting(tmp_path_factory.mktemp("paper"))
    wanted = {"base", "pool-sort-1", *NAMES}
    for job in jobs_of("small"):
        if job.name in wanted:
            work(found, job)
    work(found, Job(AGREEMENT, NAMES))
    return found


@pytest.fixture(scope="module")
def results(setting: Setting) -> Results:
    folder = setting.build.root / "results"
    write_json(folder / "setting.json", {"matrix": "small", "root": str(setting.build.root)})
    return load_results(folder)


def test_densities_are_those_of_the_checkpoints(setting: Setting, results: Results) -> None:
    build = setting.build
    base = load_weights(build.base)
    for name in NAMES:
        tuned = load_weights(build.tuned(name))
        changed = sum(int((base[key] != tuned[key]).sum()) for key in base)
        elements = sum(each.numel() for each in base.values())
        measured = results.runs[name]["measured"]
        assert measured["density"]["exact"] == pytest.approx(changed / elements), name
        assert measured["steps"][-1]["density"] == measured["density"]["exact"]
        course = measured["timeline"]
        assert course["never"] + course["returned"] + course["final"] == course["elements"]
        assert course["final"] == changed


def test_the_base_is_rounded_before_any_run(setting: Setting) -> None:
    weights = load_weights(setting.build.base)
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}


def test_masked_runs_change_nothing_else(setting: Setting, results: Results) -> None:
    """Also in float32, against where they began: the base, or the base without what was pruned."""
    build = setting.build
    base = load_weights(build.base)
    for run in (results.runs[name]["run"] for name in NAMES):
        if run["mask"] in ("seed", "kept", ""):
            continue
        found = {
            "early33": build.timeline("grpo-sort-1") / "masks" / "step-00001.zarr",
        }.get(run["mask"], build.folder(run["name"]) / "mask.zarr")
        store = ckdiff.open_store(found)
        masters = load_weights(build.masters(run["name"]))
        for key, weights in masters.items():
            outside = torch.from_numpy(~store.mask(key, rule="exact"))
            assert torch.equal(weights[outside], base[key].float()[outside]), run["name"]


def test_a_pruned_ticket_is_zero_outside_its_mask(setting: Setting, results: Results) -> None:
    name = "grpo-sort-1+kept"
    store = ckdiff.open_store(setting.build.folder(name) / "mask.zarr")
    masters = load_weights(setting.build.masters(name))
    full = load_weights(setting.build.tuned("grpo-sort-1"))
    for key, weights in masters.items():
        if weights.ndim == 2:
            kept = torch.from_numpy(store.mask(key, rule="exact"))
            assert not weights[~kept].any()
            assert full[key].abs()[kept].min() >= full[key].abs()[~kept].max(), "the largest"
        else:
            assert weights.any(), "vectors are never pruned"
    wanted = results.runs["grpo-sort-1"]["measured"]["density"]["exact"]
    assert results.runs[name]["mask_density"] == pytest.approx(wanted, abs=0.02)
    assert results.runs[name]["start"] != results.base["scores"]["sort"]


def test_agreement_has_controls(results: Results) -> None:
    (answer,) = results.question("seeds: grpo, sort, adamw mixed").values()
    (pair,) = answer["pairs"]
    assert pair["cosine"] == pytest.approx(_cosine(results, *answer["runs"]), abs=1e-3)
    assert 0 <= pair["same_direction"] <= 1
    assert answer["controls"]["random"]["nulls"]["tensor"]["lift"] == pytest.approx(1, abs=0.05)
    assert set(answer["controls"]["shuffled"]["nulls"]) == {
        "model",
        "tensor",
        "magnitude",
        "rowcol",
    }


def _cosine(results: Results, one: str, two: str) -> float:
    root = Path(results.setting["root"])
    base = load_weights(root / "base")
    first, second = (
        torch.cat(
            [
                (each - base[key].float()).flatten()
                for key, each in sorted(load_weights(root / "runs" / name / "masters").items())
            ]
        ).double()
        for name in (one, two)
    )
    return torch.nn.functional.cosine_similarity(first, second, 0).item()


def test_the_page(results: Results, setting: Setting, tmp_path: Path) -> None:
    page = write_report(setting.build.root / "results", tmp_path).read_text("utf-8")
    for name in NAMES:
        assert f"| {name} |" in page
    named = re.findall(r'(?:src|srcset)="([^"]+)"', page)
    assert len(named) >= 6
    for each in named:
        xml.etree.ElementTree.parse(tmp_path / each)
    assert "**Cannot be tested here.**" in page, "what was not run is not judged"
    assert not re.search(r"\bnan\b", page)
    lost = len(small_matrix()) - len(NAMES)
    assert f"made without {lost} of the" in page
    assert "(the untrained base)" in page
    assert max(words(sentence) for sentence in sentences(page)) <= 45, "it can be read"


def test_what_is_collected_makes_the_same_page(
    results: Results, setting: Setting, tmp_path: Path
) -> None:
    kept, root = tmp_path / "kept", setting.build.root
    write_json(root / "setting.json", read_json(root / "results" / "setting.json"))
    assert collect(argparse.Namespace(build=root, to=kept)) == 0
    one, two = (
        write_report(each, tmp_path / str(at)) for at, each in enumerate((root / "results", kept))
    )
    assert one.read_bytes() == two.read_bytes()
    main = {name for name in NAMES if results.runs[name]["run"]["group"] == "main"}
    assert {path.stem for path in (kept / "masks").iterdir()} == main
    size = sum(path.stat().st_size for path in (kept / "masks").iterdir())
    assert size < 1.2 * len(main) * results.base["parameters"] / 8 + 10_000 * len(main)


def test_a_result_of_another_run_is_not_taken(setting: Setting) -> None:
    (job,) = (each for each in jobs_of("small") if each.name == "grpo-sort-1")
    assert job.run is not None
    assert is_done(setting.build, job)
    changed = dataclasses.replace(job.run, lr=1.0)
    assert not is_done(setting.build, dataclasses.replace(job, run=changed))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(setting: Setting) -> None:
    """PPO has the most to remember: a critic, its optimizer, and AdamW's own state."""
    small: dict[str, Any] = {"steps": 20, "prompts": 4, "samples": 4, "lr": 1e-3}
    whole, stopped = (of("ppo", "main", label, **small) for label in ("whole", "stopped"))

    def session(run: Any) -> Session:
        setting.build.folder(run.name).mkdir(parents=True, exist_ok=True)
        return Session(setting, run, mask=None, start=setting.build.base)

    straight = session(whole)
    straight.train()
    first = session(stopped)
    step = first.algorithm.step

    def until_fourteen(number: int) -> dict[str, float]:
        if number == 14:
            raise KeyboardInterrupt
        return step(number)

    first.algorithm.step = until_fourteen  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = session(stopped)
    second.train()
    assert second.curve == straight.curve
    assert second.learner.norms == straight.learner.norms
    pairs = zip(
        second.learner.masters.parameters(), straight.learner.masters.parameters(), strict=True
    )
    assert all(torch.equal(one, two) for one, two in pairs)


def test_a_job_that_was_stopped_before_its_result_was_written_can_be_done_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = (each for each in jobs_of("small") if each.name == "sft-sort-1")

    def stopped(path: Path, value: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("paper.work.write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            work(setting, job)
    assert not is_done(setting.build, job)
    result = work(setting, job)
    assert is_done(setting.build, job)
    assert [point["step"] for point in result["curve"]] == [10, 20]
    left = {path.name for path in setting.build.folder(job.name).iterdir()}
    assert left == {"tuned", "masters", "changed.zarr", "timeline"}


def test_numbers_of_seeds_are_said_with_their_spread() -> None:
    runs = [{"x": value} for value in (0.1, 0.2, 0.3)]
    assert str(spread(runs, lambda each: each["x"])) == "0.200 (0.100–0.300, 3 runs)"
    assert str(spread(runs[:1], lambda each: each["x"])) == "0.100 (one run)"
    assert str(spread([], lambda each: each["x"])) == "–"
    assert str(spread([{"x": 2e-5}], lambda each: each["x"])) == "2.0e-05 (one run)"


def made(rewards: list[float], densities: list[float]) -> dict[str, Any]:
    """A result with these checkpoints."""
    point = {"accuracy": 0.5}
    return {
        "run": {"precision": "f32"},
        "start": {kind: {"reward": 0.4, **point} for kind in ("stored", "masters")},
        "end": {kind: {"reward": rewards[-1], **point} for kind in ("stored", "masters")},
        "curve": [{"step": 1, "stored": {"reward": each, **point}} for each in rewards],
        "measured": {"steps": [{"density": each, "coverage": None} for each in densities]},
    }


def test_density_at_equal_gain_lies_between_checkpoints() -> None:
    run = made([0.5, 0.7], [0.2, 0.4])
    assert density_at(run, 0.05) == pytest.approx(0.1)
    assert density_at(run, 0.2) == pytest.approx(0.3)
    assert density_at(run, 0.4) is None


def test_shares_of_a_gain() -> None:
    full, half = made([0.6], [0.1]), made([0.5], [0.1])
    assert share_of_gain(half, full) == pytest.approx(0.5)
    assert share_of_gain(half, made([0.401], [0.1])) is None, "of nothing there is no share"


def test_results_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "base.json", {})
    with pytest.raises(FileNotFoundError, match=r"agreement, setting\.json"):
        load_results(tmp_path)
    assert read_json(tmp_path / "base.json") == {}

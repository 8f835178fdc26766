"""TRL's trainers on the runs of the matrix: the same training as ours."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import example_programs
import pytest
import torch
import trainers
from example_programs import one_thread  # noqa: F401
from paper import trl_check
from paper.commands import check_trl
from paper.model import SHAPES, Model, new_model
from paper.results import Results
from paper.runs import OFFLINE, Run, of
from paper.tables import by_trl
from paper.tasks import TASKS, draw, prompts_of
from paper.train import Session, Setting
from paper.work import Job, pool_name, work

pytestmark = trainers.foreign_warnings
STEPS = 8


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A tiny base and its pool of pairs."""
    found = example_programs.small_setting(tmp_path_factory.mktemp("paper"))
    for name in ("base", pool_name("sort", 1)):
        work(found, Job(name))
    return found


def run_of(algorithm: str) -> Run:
    return dataclasses.replace(
        of(algorithm, "main", steps=STEPS, warmup=4, prompts=4, samples=4, lr=1e-4), name=algorithm
    )


def trained(model: torch.nn.Module) -> torch.Tensor:
    weights = dict(model.named_parameters())
    return torch.cat([weights[name].detach().flatten() for name in sorted(weights)])


def test_transformers_llama_is_our_model() -> None:
    model = new_model(SHAPES["tiny"], 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tokens = prompts_of(TASKS["sum"], draw(16, torch.Generator().manual_seed(2)))
    other = trl_check.llama(SHAPES["tiny"], dict(model.named_parameters()))
    logits = other(tokens).logits
    assert torch.allclose(logits, model(tokens), rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "the very ones"


def ours(setting: Setting, run: Run) -> Model:
    setting.build.folder(run.name).mkdir(parents=True, exist_ok=True)
    session = Session(setting, run, mask=None, start=setting.build.base)
    session.train()
    masters = session.learner.masters
    assert isinstance(masters, Model)
    return masters


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "kto"])
def test_the_same_rows_give_the_same_weights(
    algorithm: str, setting: Setting, tmp_path: Path
) -> None:
    run = run_of(algorithm)
    theirs = trained(trl_check.train(setting, run, tmp_path).masters)
    base = trained(setting.model(setting.build.base))
    moved = trained(ours(setting, run)) - base
    assert (theirs - base - moved).norm() < 0.01 * moved.norm() > 0


def test_grpo_learns_the_same_from_samples_of_its_own(setting: Setting, tmp_path: Path) -> None:
    run = dataclasses.replace(run_of("grpo"), steps=20, samples=8)
    theirs = trained(trl_check.train(setting, run, tmp_path).masters)
    base = trained(setting.model(setting.build.base))
    moved = trained(ours(setting, run)) - base
    assert torch.cosine_similarity(theirs - base, moved, 0) > 0.3
    assert (theirs - base).norm().item() == pytest.approx(moved.norm().item(), rel=0.3)


def test_every_algorithm_that_trl_has_too() -> None:
    assert set(trl_check.ROWS) == {"sft", "dpo", "kto", "grpo"}
    assert {name for name in trl_check.ROWS if name in OFFLINE} == {"dpo", "kto"}


def test_answers_are_rewarded_as_in_our_runs() -> None:
    judge = trl_check.judged(of("grpo", "main"))
    digits = [[3, 1, 2, 0, 5, 4]] * 3
    answers = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4], [0, 1, 2]]
    assert judge(completion_ids=answers, digits=digits, other=None) == [1.0, 0.0, 0.0]


def test_the_check_and_what_the_page_says_of_it(setting: Setting) -> None:
    run = dataclasses.replace(run_of("dpo"), name="dpo-sort-1")
    result = work(setting, Job(run.name, run=run))
    found = trl_check.check(setting, run.name)
    theirs, there = found["trl"], found["ours"]
    assert found["agreement"]["jaccard"] > 0.95
    assert found["agreement"]["cosine"] == pytest.approx(1, abs=1e-3)
    assert theirs["density"] == pytest.approx(there["density"], abs=0.01)
    assert theirs["end"]["stored"] == pytest.approx(there["end"]["stored"], abs=0.02)
    assert there["density"] == result["measured"]["density"]["exact"] > 0
    made: dict[str, Any] = {"trl": "1.2", "runs": {"dpo": found}}
    results = Results({}, {run.name: result}, {}, {}, made)
    said = by_trl(results)
    assert "TRL 1.2" in said
    assert f"| dpo | {theirs['density']:.4f} | {there['density']:.4f} |" in said
    assert "Not run" in by_trl(dataclasses.replace(results, trl={}))


def test_runs_that_are_not_done_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_trl(argparse.Namespace(build=tmp_path)) == 2
    assert capsys.readouterr().err.startswith("error: sft-sort-1 is not done: run --only sft")

"""One run, in a process of its own with one thread: training, checkpoints, scores.

The same run gives the same weights, bit for bit, on one type of machine, also where it was stopped
and went on: what it needs to go on is written at every checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paper.algorithms import algorithm_of
from paper.algorithms.algorithm import Algorithm, Log
from paper.base import Recipe
from paper.build import Build, load_weights, read_json, save_weights
from paper.learner import POOL, Learner, Pairs, new_pool
from paper.model import SHAPES, Model, log_probabilities, model_of, sample, seeded
from paper.runs import OFFLINE, Run
from paper.tasks import DIGITS, TASKS, draw, evaluate, prompts_of

OFTEN, ENDS = 512, 4096  #: held-out prompts at checkpoints, and at both ends


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is the same in all runs of a matrix."""

    build: Build
    matrix: str = "full"
    scale: str = "small"
    device: str = "cpu"
    often: int = OFTEN
    ends: int = ENDS
    pool: int = POOL
    recipe: Recipe = dataclasses.field(default_factory=Recipe)

    def model(self, path: Path) -> Model:
        """The float32 model of a checkpoint."""
        return model_of(SHAPES[self.scale], load_weights(path))


def make_pool(setting: Setting, task: str, seed: int) -> None:
    """Judge the base's answers, for the offline algorithms."""
    from safetensors.torch import save_file

    path = setting.build.pool(task, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    pool = new_pool(setting.model(setting.build.base), TASKS[task], seed, setting.pool)
    beside = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in vars(pool).items()}, beside)
    beside.replace(path)


def pool_of(setting: Setting, run: Run) -> Pairs | None:
    """The pool of a run, if its algorithm learns from one."""
    from safetensors.torch import load_file

    if run.algorithm not in OFFLINE:
        return None
    return Pairs(**load_file(setting.build.pool(run.task, run.seed), device=setting.device))


Scores = dict[str, dict[str, float]]  #: ``masters`` and ``stored`` -> accuracy and reward


def scores(setting: Setting, model: nn.Module, task: str, count: int) -> Scores:
    """Accuracy and reward of the weights as they are trained, and as they are stored."""
    shape = SHAPES[setting.scale]
    weights = model.state_dict()
    stored = model_of(shape, {name: each.bfloat16() for name, each in weights.items()})
    found = evaluate(stored, TASKS[task], count)
    if all(torch.equal(each, stored.state_dict()[name]) for name, each in weights.items()):
        return {"masters": found, "stored": found}
    return {"masters": evaluate(model_of(shape, weights), TASKS[task], count), "stored": found}


@torch.no_grad()
def distance(learner: Learner, count: int) -> float:
    """KL(π‖base) of whole answers in nats, by samples of the policy to held-out prompts."""
    digits = draw(count, seeded(5), held=True)
    prompts = prompts_of(learner.task, digits)
    generator = seeded(6)
    answers = sample(learner.policy, prompts, DIGITS, 1, generator)
    ours, theirs = (
        log_probabilities(model, prompts, answers).sum(1)
        for model in (learner.policy, learner.reference)
    )
    return (ours - theirs).mean().item()


class Session:
    """A run that is being trained, and what is known of it so far."""

    def __init__(self, setting: Setting, run: Run, *, mask: Path | None, start: Path) -> None:
        self.setting, self.run = setting, run
        base = setting.model(setting.build.base)
        self.learner = Learner(
            run, base, setting.model(start), pool=pool_of(setting, run), mask=mask
        )
        self.algorithm: Algorithm = algorithm_of(self.learner)
        self.curve: list[dict[str, Any]] = []
        self.logs: list[Log] = []
        self.seconds = 0.0

    @property
    def progress(self) -> Path:
        return self.setting.build.folder(self.run.name) / "progress.pt"

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        learner = self.learner
        own: dict[str, nn.Module | torch.optim.Optimizer] = {
            "masters": learner.masters,
            "optimizer": learner.optimizer,
        }
        return {**own, **self.algorithm.kept()}

    def keep(self) -> None:
        """Write what is needed to go on from here."""
        state = {
            "run": dataclasses.asdict(self.run),
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
            "generator": self.learner.generator.get_state(),
            "number": self.learner.number + 1,
            "norms": self.learner.norms,
            "curve": self.curve,
            "logs": self.logs,
            "seconds": self.seconds,
        }
        beside = self.progress.with_suffix(".part")
        torch.save(state, beside)
        beside.replace(self.progress)

    def resume(self) -> int:
        """The step to begin with: where an earlier process stopped, or 0."""
        if not self.progress.exists():
            return 0
        state = torch.load(self.progress, weights_only=True)
        if state["run"] != dataclasses.asdict(self.run):
            return 0  # what lies here is of another matrix
        for name, part in self._parts().items():
            part.load_state_dict(state["parts"][name])
        self.learner.generator.set_state(state["generator"])
        self.learner.norms = state["norms"]
        self.learner.round()
        self.curve, self.logs = state["curve"], state["logs"]
        self.seconds = state["seconds"]
        return int(state["number"])

    def checkpoint(self, step: int) -> None:
        """Store the model as it is after ``step`` steps, and score it."""
        setting, learner = self.setting, self.learner
        save_weights(setting.build.checkpoint(self.run.name, step), learner.masters.state_dict())
        recent = self.logs[-10:]
        log = {key: _mean([each[key] for each in recent if key in each]) for key in recent[-1]}
        scored = scores(setting, learner.masters, self.run.task, setting.often)
        self.curve.append({"step": step, **scored, "log": log})

    def train(self) -> None:
        """All steps that are left."""
        for number in range(self.resume(), self.run.steps):
            began = time.process_time()
            self.learner.number = number
            self.logs.append(self.algorithm.step(number))
            self.seconds += time.process_time() - began
            if number + 1 in self.run.checkpoints:
                self.checkpoint(number + 1)
                self.keep()

    def finish(self) -> dict[str, Any]:
        """Write the model at the end; gives what is known of the run."""
        build, name, learner = self.setting.build, self.run.name, self.learner
        weights = learner.masters.state_dict()
        save_weights(build.tuned(name), weights)
        save_weights(build.masters(name), weights, rounded=False)
        norms = learner.norms
        clipped = sum(norm > self.run.gradient_clip for norm in norms) if norms else 0
        return {
            "run": dataclasses.asdict(self.run),
            "scale": self.setting.scale,
            "curve": self.curve,
            "end": scores(self.setting, learner.masters, self.run.task, self.setting.ends),
            "kl": distance(learner, min(1024, self.setting.ends)),
            "gradient_norm": _mean(norms),
            "gradient_clipped": clipped / max(1, len(norms)) if self.run.gradient_clip else 0.0,
            "clip_fraction": _mean([each.get("clip_fraction", 0.0) for each in self.logs]),
            "optimizer_steps": len(norms),
            "cpu_seconds": round(self.seconds, 1),
            "torch": torch.__version__,
        }


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def train_run(setting: Setting, run: Run, *, mask: Path | None, start: Path) -> dict[str, Any]:
    """Train a run to its end, from where an earlier process stopped; gives what is known of it.

    ``mask`` is a mask store, or None to train every weight; ``start`` is where it begins.
    """
    setting.build.folder(run.name).mkdir(parents=True, exist_ok=True)
    session = Session(setting, run, mask=mask, start=start)
    began: Scores = read_json(setting.build.result("base"))["scores"][run.task]
    if run.start != "base":
        began = scores(setting, session.learner.masters, run.task, setting.ends)
    session.train()
    return {**session.finish(), "start": began}

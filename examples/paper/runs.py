"""Which runs there are: the whole matrix as data, in the order in which they are done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

ALGORITHMS = ("sft", "rft", "grpo", "rloo", "ppo", "prime", "dpo", "simpo", "kto", "orpo")
#: those that learn from answers of the base that were judged before the run
OFFLINE = ("rft", "dpo", "simpo", "kto", "orpo")


@dataclass(frozen=True)
class Run:
    """One training run, whole: what is not here is the same in all runs."""

    name: str
    group: str  #: what it is for: ``main``, ``task``, ``sgd``, ``sweep``, ...
    algorithm: str
    task: str = "sort"
    seed: int = 1
    optimizer: str = "adamw"  #: or ``sgd``
    lr: float = 1e-6
    #: ``f32``: forward with float32 weights; ``mixed``: float32 masters, forward with these
    #: rounded to bfloat16; ``bf16``: weights, forward and optimizer in bfloat16
    precision: str = "mixed"
    steps: int = 100
    warmup: int = 10
    prompts: int = 16
    samples: int = 8
    clip: float = 0.2  #: of probability ratios; 0 is none
    epochs: int = 1  #: over each batch of samples
    minibatches: int = 1
    gradient_clip: float = 1.0  #: of the gradient's norm; 0 is none
    beta: float = 0.0  #: of the KL term, or of the preference; which one, the algorithm says
    margin: float = 0.0
    side_lr: float = 0.0  #: of PPO's critic and of PRIME's process reward model
    off_policy: float = 0.0  #: the share of prompts whose answers the base samples
    mask: str = ""  #: train only these weights: see ``retrain.py`` and ``tickets.py``
    of: str = ""  #: the run whose training is repeated with the mask
    start: str = "base"  #: or ``pruned``: the base without the weights that the mask lacks

    @property
    def checkpoints(self) -> list[int]:
        """The steps after which there is a checkpoint: every ten, and the last."""
        return sorted({*range(10, self.steps, 10), self.steps})


#: what belongs to each algorithm, in every run of it that does not say otherwise
OWN: dict[str, dict[str, float]] = {
    "ppo": {"beta": 0.02, "side_lr": 1e-4},
    "prime": {"beta": 0.2, "side_lr": 1e-4},
    "dpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "margin": 1.0},
    "kto": {"beta": 0.1},
    "orpo": {"beta": 0.5},
}
#: SGD needs larger rates: its steps are as small as the gradient, AdamW's as large as the rate
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 1e-3}
F32: dict[str, Any] = {"lr": 5e-7, "steps": 120, "precision": "f32"}


def of(algorithm: str, group: str, label: str = "", **changed: Any) -> Run:
    """A run of an algorithm with what belongs to it; its name says all that is not usual."""
    fields = {**OWN.get(algorithm, {}), **changed}
    run = Run("", group, algorithm, **fields)
    parts = (algorithm, run.task, str(run.seed), label)
    return dataclasses.replace(run, name="-".join(part for part in parts if part))


def main_runs() -> list[Run]:
    """Every algorithm, three seeds: AdamW, mixed precision."""
    return [of(each, "main", seed=seed) for seed in (1, 2, 3) for each in ALGORITHMS]


def task_runs() -> list[Run]:
    """Three algorithms on the second task."""
    names = ("grpo", "dpo", "sft")
    return [of(each, "task", task="sum", seed=seed) for seed in (1, 2, 3) for each in names]


def sgd_runs() -> list[Run]:
    """The same with SGD: five algorithms, and one on the second task."""
    names = ("grpo", "dpo", "ppo", "prime", "sft")
    found = [of(each, "sgd", "sgd", seed=seed, **SGD) for seed in (1, 2, 3) for each in names]
    return [*found, *(of("grpo", "sgd", "sgd", task="sum", seed=seed, **SGD) for seed in (1, 2, 3))]


def sweep_runs() -> list[Run]:
    """Learning rates, on both sides of the main arm's."""
    rates = (3e-7, 3e-6, 1e-5)
    found = [
        of(each, "sweep", f"lr{lr:g}", lr=lr, seed=seed)
        for each in ("grpo", "sft")
        for lr in rates
        for seed in (1, 2)
    ]
    # at 1e-5 and beta .1 DPO goes on past its best: both arms are shown
    return [
        *found,
        of("dpo", "sweep", "lr1e-05", lr=1e-5),
        of("dpo", "sweep", "lr3e-06-beta.5", lr=3e-6, beta=0.5),
    ]


def precision_runs() -> list[Run]:
    """GRPO with other forwards; the mixed arms are in ``main`` and ``sgd``."""
    found = []
    for seed in (1, 2):
        found += [
            of("grpo", "precision", "f32", seed=seed, **F32),
            of("grpo", "precision", "bf16", seed=seed, precision="bf16"),
            of("grpo", "precision", "sgd-f32", seed=seed, **{**SGD, "precision": "f32"}),
            of("grpo", "precision", "sgd-bf16", seed=seed, **{**SGD, "precision": "bf16"}),
        ]
    return [
        *found,
        *(
            of(each, "precision", "f32", seed=seed, **F32)
            for each in ("dpo", "ppo")
            for seed in (1, 2)
        ),
        *(of(each, "precision", "f32", task="sum", **F32) for each in ("grpo", "dpo", "ppo")),
        of("grpo", "precision", "sgd-f32", task="sum", **{**SGD, "precision": "f32"}),
    ]


def matrix() -> list[Run]:
    """All runs. Those that need masks of others come after them."""
    from paper.ablations import ablation_runs
    from paper.retrain import retraining_runs
    from paper.tickets import ticket_runs

    full = [*main_runs(), *task_runs(), *sgd_runs(), *sweep_runs(), *precision_runs()]
    return [*full, *ablation_runs(), *retraining_runs(full), *ticket_runs()]


def small_matrix() -> list[Run]:
    """A matrix for tests: every algorithm, arm and kind of mask once, a few steps each."""
    from paper.retrain import MASKS, again

    small: dict[str, Any] = {"steps": 20, "prompts": 4, "samples": 4, "lr": 1e-4}
    full = [of(each, "main", **small) for each in ALGORITHMS]
    grpo = of("grpo", "main", **small)
    full += [
        of("grpo", "main", seed=2, **small),
        of("grpo", "task", task="sum", **small),
        of("grpo", "sgd", "sgd", **{**small, "optimizer": "sgd", "lr": 1e-2}),
        of("grpo", "precision", "f32", precision="f32", **small),
        of("grpo", "precision", "bf16", precision="bf16", **small),
        of("grpo", "ablation", "half-off", off_policy=0.5, beta=0.1, epochs=2, **small),
    ]
    masked = [again(grpo, kind) for kind in MASKS]
    return [
        *full,
        *masked,
        again(grpo, "kept", group="ticket", start="pruned"),
        again(grpo, "percent", group="ticket"),
    ]


MATRICES = {"full": matrix, "small": small_matrix}


def chosen(runs: Iterable[Run], only: str = "*") -> list[Run]:
    """The runs whose names match, and those that they need."""
    every = {run.name: run for run in runs}
    wanted: dict[str, Run] = {}

    def take(name: str) -> None:
        for other in needs(every[name]):
            take(other)
        wanted.setdefault(name, every[name])

    for name in every:
        if fnmatchcase(name, only):
            take(name)
    return list(wanted.values())


def needs(run: Run) -> list[str]:
    """Names of the runs that must be done before this one."""
    from paper.retrain import lenders

    return lenders(run) if run.mask else []

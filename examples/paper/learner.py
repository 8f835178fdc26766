"""What all algorithms work with: the policy in its precision, the optimizer, samples and pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paper.model import Model, log_probabilities, model_of, sample, seeded
from paper.runs import Run
from paper.tasks import DIGITS, TASKS, Task, draw, prompts_of, rewards

POOL = 4096  #: pairs of an offline pool
MOST_ROUNDS = 200  #: of 512 prompts, until a pool must be full


@dataclass(frozen=True)
class Rollout:
    """Samples of a step, the answers to one prompt side by side."""

    prompts: Tensor  #: int64 (prompts · samples, 8)
    answers: Tensor  #: int64 (prompts · samples, 6)
    rewards: Tensor  #: float32 (prompts · samples,)
    old: Tensor  #: log probabilities of the tokens where they were sampled, (…, 6)


@dataclass(frozen=True)
class Pairs:
    """A right and a wrong answer of the base to each prompt, and how likely the base finds them."""

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor  #: log probabilities of the tokens, (pairs, 6)
    rejected_reference: Tensor

    def taken(self, rows: Tensor) -> Pairs:
        """Some of them."""
        return Pairs(**{name: tensor[rows] for name, tensor in vars(self).items()})


def new_pool(base: Model, task: Task, seed: int, count: int = POOL) -> Pairs:
    """Prompts that the base, of eight samples, answers both rightly and wrongly: one of each."""
    generator = seeded(seed * 1000 + 3)
    found: list[tuple[Tensor, ...]] = []
    while sum(len(prompts) for prompts, *_ in found) < count:
        if len(found) == MOST_ROUNDS:
            raise ValueError(f"the base is hardly ever right at {task.name}, so there are no pairs")
        digits = draw(512, generator)
        prompts = prompts_of(task, digits)
        answers = sample(base, prompts, DIGITS, 8, generator).view(-1, 8, DIGITS)
        good = (answers == task.right(digits)[:, None]).all(2)
        mixed = good.any(1) & ~good.all(1)
        prompts, answers, good = prompts[mixed], answers[mixed], good[mixed]
        rows = torch.arange(len(prompts))
        picked = (
            answers[rows, torch.multinomial(kind.float(), 1, generator=generator)[:, 0]]
            for kind in (good, ~good)
        )
        found.append((prompts, *picked))
    prompts, chosen, rejected = (torch.cat(each)[:count] for each in zip(*found, strict=True))
    with torch.no_grad():
        logs = [
            torch.cat(
                [
                    log_probabilities(base, *part)
                    for part in zip(
                        *(torch.split(each, 1024) for each in (prompts, answers)), strict=True
                    )
                ]
            )
            for answers in (chosen, rejected)
        ]
    return Pairs(prompts, chosen, rejected, *logs)


def order_of(step: int, count: int, total: int, seed: int) -> Tensor:
    """Which of ``total`` pairs step ``step`` takes: all once, in a new order in each round."""
    places = torch.arange(step * count, (step + 1) * count)
    out = torch.empty(count, dtype=torch.long)
    for turn in sorted({place // total for place in places.tolist()}):
        generator = seeded(seed * 1000 + 500 + turn)
        order = torch.randperm(total, generator=generator)
        here = places // total == turn
        out[here] = order[places[here] % total]
    return out


class Learner:
    """A policy that is being trained."""

    def __init__(
        self, run: Run, base: Model, start: Model, *, pool: Pairs | None, mask: Path | None
    ) -> None:
        self.run = run
        self.task = TASKS[run.task]
        self.reference = base.requires_grad_(False)
        self.pool = pool
        weights, shape = start.state_dict(), base.shape
        self.masters: nn.Module = model_of(shape, weights)
        self.policy: nn.Module = self.masters
        if run.precision == "mixed":
            self.policy = model_of(shape, weights)
        elif run.precision == "bf16":
            self.masters = self.policy = self.masters.bfloat16()
        self.generator = seeded(run.seed * 1000 + 7)
        self.optimizer = optimizer_of(run, self.masters, mask)
        self.taken = 0  #: steps of the optimizer
        self.number = 0  #: the algorithm's step, from 0
        self.norms: list[float] = []  #: of gradients, before clipping
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """In mixed precision: the policy is the masters, rounded to bfloat16."""
        if self.policy is not self.masters:
            pairs = zip(self.policy.parameters(), self.masters.parameters(), strict=True)
            for seen, master in pairs:
                seen.copy_(master.bfloat16())

    def update(self, loss: Tensor) -> None:
        """One step of the optimizer. The gradient is clipped whole, then masked, as in papers."""
        run = self.run
        self.policy.zero_grad()
        torch.autograd.backward(loss)
        pairs = zip(self.policy.parameters(), self.masters.parameters(), strict=True)
        for seen, master in pairs:
            master.grad = seen.grad
        for group in self.optimizer.param_groups:
            group["lr"] = run.lr * min(1.0, (self.number + 1) / max(1, run.warmup))
        most = run.gradient_clip if run.gradient_clip > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self.masters.parameters(), most)
        self.norms.append(norm.item())
        self.optimizer.step()
        self.taken += 1
        self.round()

    def rollout(self) -> Rollout:
        """Samples of the policy; for the last prompts of the base, where data is off-policy."""
        run = self.run
        digits = draw(run.prompts, self.generator)
        apart = run.prompts - round(run.off_policy * run.prompts)
        answers, old = [], []
        for model, part in ((self.policy, digits[:apart]), (self.reference, digits[apart:])):
            if len(part) == 0:
                continue
            prompts = prompts_of(self.task, part)
            answers.append(sample(model, prompts, DIGITS, run.samples, self.generator))
            with torch.no_grad():
                prompts = prompts.repeat_interleave(run.samples, 0)
                old.append(log_probabilities(model, prompts, answers[-1]))
        many = digits.repeat_interleave(run.samples, 0)
        every = torch.cat(answers)
        scored = rewards(self.task, many, every)
        return Rollout(prompts_of(self.task, many), every, scored, torch.cat(old))

    def pairs(self, step: int, count: int) -> Pairs:
        """The pairs of a step."""
        assert self.pool is not None, "an offline algorithm has a pool"
        rows = order_of(step, count, len(self.pool.prompts), self.run.seed)
        return self.pool.taken(rows)


def optimizer_of(run: Run, model: nn.Module, mask: Path | None) -> torch.optim.Optimizer:
    """AdamW or plain SGD, without decay; of masked weights only, where there is a mask."""
    options: dict[str, Any] = {"lr": run.lr}
    kind: type[torch.optim.Optimizer] = torch.optim.SGD
    if run.optimizer == "adamw":
        kind = torch.optim.AdamW
        options |= {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    if mask is None:
        return kind(model.parameters(), **options)
    from ckdiff.training import SubnetworkOptimizer

    return SubnetworkOptimizer(kind, model, mask, missing="freeze", **options)

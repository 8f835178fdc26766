"""Two tasks on six digits with one right answer each, and demonstrations of mixed quality.

``sort`` puts the digits in order, ``sum`` says their running sum modulo 10. One multiset of digits
in ten is held out: no order of it is ever trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paper.model import answer_logits, seeded

DIGITS = 6
EQUALS = 10


@dataclass(frozen=True)
class Task:
    """What is asked; digits and answers are (batch, 6)."""

    name: str
    token: int  #: says which task a prompt is of
    right: Callable[[Tensor], Tensor]
    flawed: Callable[[Tensor], Tensor]  #: the systematic mistake that many demonstrations make
    slipped: Callable[[Tensor, Tensor], Tensor]  #: right answers with one slip at these places


def _swapped(right: Tensor, place: Tensor) -> Tensor:
    """Two neighbours change places."""
    slip = right.clone()
    slip.scatter_(1, place, right.gather(1, place + 1))
    return slip.scatter_(1, place + 1, right.gather(1, place))


def _carried(right: Tensor, place: Tensor) -> Tensor:
    """One too much from some place on."""
    return (right + (torch.arange(DIGITS) > place)) % 10


TASKS = {
    "sort": Task(
        "sort",
        11,
        lambda digits: digits.sort(1).values,
        lambda digits: digits.sort(1, descending=True).values,
        _swapped,
    ),
    "sum": Task(
        "sum",
        12,
        lambda digits: digits.cumsum(1) % 10,
        lambda digits: digits.cummax(1).values,
        _carried,
    ),
}


def held_out(digits: Tensor) -> Tensor:
    """Which rows are kept for evaluation, bool (batch,): the same for all orders of the digits."""
    key = (digits.sort(1).values * 10 ** torch.arange(DIGITS)).sum(1)
    return ((key * 2654435761) % (1 << 32) >> 9) % 10 == 0


def draw(count: int, generator: torch.Generator, *, held: bool = False) -> Tensor:
    """Random digits, int64 (count, 6), to train on or held out."""
    found = torch.empty(0, DIGITS, dtype=torch.long)
    while len(found) < count:
        digits = torch.randint(0, 10, (count * (12 if held else 2), DIGITS), generator=generator)
        found = torch.cat((found, digits[held_out(digits) == held]))
    return found[:count]


def prompts_of(task: Task, digits: Tensor) -> Tensor:
    """``[task] digits =``, int64 (batch, 8)."""
    first = torch.full((len(digits), 1), task.token)
    return torch.cat((first, digits, torch.full((len(digits), 1), EQUALS)), 1)


#: shares of right and of systematically flawed demonstrations; the rest has a slip
EASY, HARD = (0.6, 0.2), (0.3, 0.5)


def demonstrations(task: Task, digits: Tensor, generator: torch.Generator) -> Tensor:
    """Answers of mixed quality: mostly right where the first digit is even, mostly flawed where
    it is odd. A model of these knows how to be right and often is not: what RL can mend.
    """
    right = task.right(digits)
    place = torch.randint(0, DIGITS - 1, (len(digits), 1), generator=generator)
    chance = torch.rand(len(digits), 1, generator=generator)
    odd = digits[:, :1] % 2 == 1
    good = torch.where(odd, HARD[0], EASY[0])
    flawed = good + torch.where(odd, HARD[1], EASY[1])
    wrong = torch.where(chance < flawed, task.flawed(digits), task.slipped(right, place))
    return torch.where(chance < good, right, wrong)


def rewards(task: Task, digits: Tensor, answers: Tensor) -> Tensor:
    """1 for a right answer, 0 for any other: float32 (batch,)."""
    return (answers == task.right(digits)).all(1).float()


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, count: int) -> dict[str, float]:
    """Greedy ``accuracy`` and mean ``reward`` on held-out prompts, always the same ones.

    Both are without noise of sampling: greedy decoding is right where each token of the right
    answer is the likeliest one, and the mean reward of a sample is the right answer's probability.
    """
    digits = draw(count, seeded(1), held=True)
    correct = reward = 0.0
    for part in torch.split(digits, 1024):
        right = task.right(part)
        logs = answer_logits(model, prompts_of(task, part), right).log_softmax(-1)
        correct += (logs.argmax(-1) == right).all(1).sum().item()
        reward += logs.gather(2, right[:, :, None]).sum((1, 2)).exp().sum().item()
    return {"accuracy": correct / count, "reward": reward / count}

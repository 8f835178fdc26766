"""The model that every run starts from: trained on demonstrations, rounded to bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paper.model import SHAPES, Model, log_probabilities, model_of, new_model, seeded
from paper.tasks import TASKS, demonstrations, draw, evaluate, prompts_of


@dataclass(frozen=True)
class Recipe:
    """How the base is trained; half of each batch is of each task."""

    steps: int = 600
    batch: int = 256
    lr: float = 2e-3
    warmup: int = 50
    seed: int = 0


def rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step, counted from 1: warm-up, then a cosine down to a tenth."""
    done = max(0, step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    cosine = 0.55 + 0.45 * math.cos(math.pi * done)
    return recipe.lr * min(1.0, step / max(1, recipe.warmup)) * cosine


def batch_of(recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts (batch, 8) and demonstrations (batch, 6)."""
    prompts, answers = [], []
    share = recipe.batch // len(TASKS)
    for task in TASKS.values():
        digits = draw(share, generator)
        prompts.append(prompts_of(task, digits))
        answers.append(demonstrations(task, digits, generator))
    return torch.cat(prompts), torch.cat(answers)


def train_base(scale: str, recipe: Recipe, say: Callable[[str], None] = print) -> Model:
    """The base in float32, whose weights are bfloat16's: so no run starts on a rounding boundary
    that others share.
    """
    shape = SHAPES[scale]
    model = new_model(shape, recipe.seed)
    generator = seeded(recipe.seed + 100)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, recipe.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        loss = -log_probabilities(model, *batch_of(recipe, generator)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % 100 == 0:
            scores = " ".join(
                f"{name} {evaluate(model, task, 512)['reward']:.3f}" for name, task in TASKS.items()
            )
            say(f"base: step {step}, loss {loss.item():.4f}, rewards {scores}")
    return model_of(shape, {name: each.bfloat16() for name, each in model.state_dict().items()})

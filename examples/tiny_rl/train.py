"""Train the tiny checkpoints of this example: one base, two RL runs, one supervised run.

The model is a Llama-shaped decoder of 0.44M parameters that learns to sort six digits:

    3 1 4 1 5 9 =  ->  1 1 3 4 5 9

1. ``base``: supervised training from random weights, stopped while the model still makes mistakes.
2. ``rl_seed1``, ``rl_seed2``: from ``base``, a group-relative policy gradient on its own samples.
   The reward is 1 if all six digits are right and 0 otherwise. The seed decides the prompts and
   the samples.
3. ``sft``: from ``base``, supervised training with the same optimizer setting, the same number of
   steps and the same number of sequences in a step. The contrast.

Weights, gradients and optimizer state are float32 throughout; the checkpoints are rounded to
bfloat16 (nearest even) when they are saved. ``base_fp32`` and ``rl_seed1_fp32`` keep the float32
weights. At the end a small numpy calculation reads the saved files back and counts which elements
differ.

    python train.py --out DIR     # DIR/train.log, DIR/checkpoints/*/model.safetensors

Needs torch, numpy and safetensors; runs on one CPU core.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]
BitArrays = dict[str, npt.NDArray[Any]]
Masks = dict[str, npt.NDArray[np.bool_]]

DIGITS = 6
EQUALS, PAD = 10, 11  # no sequence we write contains PAD, but the policy may sample it
VOCAB = 12


@dataclass(frozen=True)
class Recipe:
    """Every number that decides the result."""

    hidden: int = 96
    layers: int = 4
    heads: int = 4
    mlp: int = 256
    init_std: float = 0.02
    split_seed: int = 0
    init_seed: int = 0
    base_data_seed: int = 100
    base_steps: int = 80
    base_batch: int = 256
    base_lr: float = 1e-3
    base_warmup: int = 20
    tune_steps: int = 150
    tune_lr: float = 1e-6
    prompts: int = 16
    group: int = 16
    held_out: int = 8192


# ------------------------------------------------------------------------------------- the model


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, the two halves of a head paired as in Llama."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, eps=1e-6)


class Attention(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.heads = recipe.heads
        self.q_proj = nn.Linear(recipe.hidden, recipe.hidden, bias=False)
        self.k_proj = nn.Linear(recipe.hidden, recipe.hidden, bias=False)
        self.v_proj = nn.Linear(recipe.hidden, recipe.hidden, bias=False)
        self.o_proj = nn.Linear(recipe.hidden, recipe.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: list[Tensor]) -> Tensor:
        """Attend to ``past`` (keys and values; empty at the start, updated in place) and ``x``."""
        batch, length, hidden = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, hidden // self.heads).transpose(1, 2)

        query = rotate(split(self.q_proj(x)), cos, sin)
        key = rotate(split(self.k_proj(x)), cos, sin)
        value = split(self.v_proj(x))
        if past:
            # Only single tokens follow a cached prefix, so nothing has to be masked here.
            assert length == 1
            key = torch.cat((past[0], key), dim=2)
            value = torch.cat((past[1], value), dim=2)
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        past[:] = [key, value]
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return out


class MLP(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(recipe.hidden, recipe.mlp, bias=False)
        self.up_proj = nn.Linear(recipe.hidden, recipe.mlp, bias=False)
        self.down_proj = nn.Linear(recipe.mlp, recipe.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(recipe.hidden)
        self.self_attn = Attention(recipe)
        self.post_attention_layernorm = RMSNorm(recipe.hidden)
        self.mlp = MLP(recipe)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: list[Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, recipe.hidden)
        self.layers = nn.ModuleList(Layer(recipe) for _ in range(recipe.layers))
        self.norm = RMSNorm(recipe.hidden)


class SortModel(nn.Module):
    """A decoder whose tensors are named as in a Llama checkpoint."""

    cos: Tensor
    sin: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.depth = recipe.layers
        self.model = Decoder(recipe)
        self.lm_head = nn.Linear(recipe.hidden, VOCAB, bias=False)
        size = recipe.hidden // recipe.heads
        rates = 10_000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(2 * DIGITS + 1), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def initialise(self, std: float, seed: int) -> None:
        """Normal matrices, norms at one."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, std, generator=generator)

    def forward(self, tokens: Tensor, past: list[list[Tensor]] | None = None) -> Tensor:
        if past is None:
            past = [[] for _ in range(self.depth)]
        start = past[0][0].shape[2] if past[0] else 0
        cos = self.cos[start : start + tokens.shape[1]]
        sin = self.sin[start : start + tokens.shape[1]]
        x = self.model.embed_tokens(tokens)
        for layer, layer_past in zip(self.model.layers, past, strict=True):
            x = layer(x, cos, sin, layer_past)
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits


# -------------------------------------------------------------------------------------- the task


class Task:
    """Six digits in, the same digits sorted out.

    One in ten of the 5,005 multisets of six digits is held out in every order, so that a held-out
    prompt is not a training prompt shuffled.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._places = 10 ** torch.arange(DIGITS - 1, -1, -1)
        multisets = torch.tensor(list(combinations_with_replacement(range(10), DIGITS)))
        order = torch.randperm(len(multisets), generator=generator)
        self._held_out = torch.zeros(10**DIGITS, dtype=torch.bool)
        self._held_out[(multisets[order[: len(multisets) // 10]] * self._places).sum(1)] = True

    def _is_held_out(self, digits: Tensor) -> Tensor:
        return self._held_out[(digits.sort(1).values * self._places).sum(1)]

    def _draw(self, count: int, generator: torch.Generator, held_out: bool) -> Tensor:
        found = torch.empty(0, DIGITS, dtype=torch.long)
        while len(found) < count:
            digits = torch.randint(0, 10, (4 * count, DIGITS), generator=generator)
            found = torch.cat((found, digits[self._is_held_out(digits) == held_out]))
        return found[:count]

    def train(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` random training prompts, shape (count, 6)."""
        return self._draw(count, generator, held_out=False)

    def test(self, count: int, seed: int) -> Tensor:
        """``count`` held-out prompts, the same for every evaluation."""
        return self._draw(count, torch.Generator().manual_seed(seed), held_out=True)


def answer_logits(model: SortModel, digits: Tensor, answer: Tensor) -> Tensor:
    """The logits for each of the six answer positions, given the answer digits before it."""
    equals = torch.full((len(digits), 1), EQUALS)
    logits: Tensor = model(torch.cat((digits, equals, answer[:, :-1]), dim=1))
    return logits[:, DIGITS:]


def token_logprobs(model: SortModel, digits: Tensor, answer: Tensor) -> Tensor:
    """log p of each answer digit, shape (batch, 6)."""
    logprobs = answer_logits(model, digits, answer).log_softmax(-1)
    return logprobs.gather(2, answer[:, :, None]).squeeze(2)


@torch.no_grad()
def sample(model: SortModel, digits: Tensor, generator: torch.Generator) -> Tensor:
    """One answer for each prompt, sampled at temperature 1."""
    past: list[list[Tensor]] = [[] for _ in range(model.depth)]
    tokens = torch.cat((digits, torch.full((len(digits), 1), EQUALS)), dim=1)
    answer: list[Tensor] = []
    for _ in range(DIGITS):
        probabilities = model(tokens, past)[:, -1].softmax(-1)
        tokens = torch.multinomial(probabilities, 1, generator=generator)
        answer.append(tokens)
    return torch.cat(answer, dim=1)


@torch.no_grad()
def evaluate(model: SortModel, digits: Tensor) -> tuple[Tensor, Tensor]:
    """For each prompt: is the greedy answer right, and what is the expected reward.

    There is one right answer, so one pass over it gives both without sampling: the greedy answer
    is right when every digit of the right answer has the largest logit, and the chance that a
    sampled answer is right (the expected reward) is the probability of the right answer.
    """
    right: list[Tensor] = []
    reward: list[Tensor] = []
    for batch in torch.split(digits, 1024):
        answer = batch.sort(1).values
        logprobs = answer_logits(model, batch, answer).log_softmax(-1)
        right.append((logprobs.argmax(-1) == answer).all(1))
        reward.append(logprobs.gather(2, answer[:, :, None]).sum((1, 2)).exp())
    return torch.cat(right), torch.cat(reward)


# ---------------------------------------------------------------------------------- the training


class Log:
    """Prints lines and keeps them in a file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._started = time.monotonic()

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()

    def seconds(self) -> str:
        return f"{time.monotonic() - self._started:.0f} s"


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimizer step."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def supervised_loss(model: SortModel, digits: Tensor) -> Tensor:
    return -token_logprobs(model, digits, digits.sort(1).values).mean()


def train_base(model: SortModel, task: Task, recipe: Recipe, log: Log) -> None:
    """Supervised training from random weights: linear warm-up, then cosine to a tenth."""
    generator = torch.Generator().manual_seed(recipe.base_data_seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.base_lr, weight_decay=0.0)
    for step in range(1, recipe.base_steps + 1):
        progress = max(0, step - recipe.base_warmup) / (recipe.base_steps - recipe.base_warmup)
        scale = min(1.0, step / recipe.base_warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = recipe.base_lr * scale
        loss = supervised_loss(model, task.train(recipe.base_batch, generator))
        descend(optimizer, loss)
        if step % 20 == 0:
            log(f"base step {step:4d}  loss {loss.item():.4f}  ({log.seconds()})")


def train_rl(model: SortModel, task: Task, recipe: Recipe, seed: int, log: Log) -> None:
    """Group-relative policy gradient: a group of samples for each prompt, each sample's reward
    normalised by its group's mean and standard deviation, one optimizer step for each batch of
    samples. No KL term, no clipping, no weight decay. A group whose samples are all right or all
    wrong has zero advantage and teaches nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.tune_lr, weight_decay=0.0)
    rewards: list[float] = []
    mixed: list[float] = []
    for step in range(1, recipe.tune_steps + 1):
        prompts = task.train(recipe.prompts, generator)
        digits = prompts.repeat_interleave(recipe.group, dim=0)
        answer = sample(model, digits, generator)
        reward = (answer == digits.sort(1).values).all(1).float()
        groups = reward.view(recipe.prompts, recipe.group)
        spread = groups.std(1, keepdim=True)
        advantage = ((groups - groups.mean(1, keepdim=True)) / (spread + 1e-4)).view(-1, 1)
        loss = -(advantage * token_logprobs(model, digits, answer)).mean()
        descend(optimizer, loss)
        rewards.append(reward.mean().item())
        mixed.append((spread > 0).float().mean().item())
        if step % 25 == 0:
            log(
                f"rl seed {seed} step {step:4d}  training reward {np.mean(rewards[-25:]):.4f}"
                f"  mixed groups {np.mean(mixed[-25:]):.2f}  ({log.seconds()})"
            )


def train_sft(model: SortModel, task: Task, recipe: Recipe, seed: int, log: Log) -> None:
    """The contrast: right answers instead of sampled ones, as many sequences in a step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.tune_lr, weight_decay=0.0)
    losses: list[float] = []
    for step in range(1, recipe.tune_steps + 1):
        loss = supervised_loss(model, task.train(recipe.prompts * recipe.group, generator))
        descend(optimizer, loss)
        losses.append(loss.item())
        if step % 25 == 0:
            log(f"sft step {step:4d}  loss {np.mean(losses[-25:]):.4f}  ({log.seconds()})")


def snapshot(model: SortModel) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def save(weights: Weights, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------- what changed, in plain numpy


def load_bits(folder: Path) -> BitArrays:
    """The stored bit patterns, uint16 for bfloat16 and uint32 for float32, sorted by name."""
    views = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}
    tensors = load_file(folder / "model.safetensors")
    return {
        name: tensors[name].view(views[tensors[name].dtype]).numpy() for name in sorted(tensors)
    }


def to_bf16(bits: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Round finite float32 bit patterns to bfloat16 bit patterns, nearest even."""
    wide = bits.astype(np.uint64)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def changed(base: BitArrays, tuned: BitArrays) -> Masks:
    return {name: base[name] != tuned[name] for name in base}


def flat(masks: Masks) -> npt.NDArray[np.bool_]:
    return np.concatenate([masks[name].ravel() for name in masks])


def density(masks: Masks) -> float:
    return float(flat(masks).mean())


def expected_jaccard(first: Masks, second: Masks, cells: npt.NDArray[np.int64]) -> float:
    """Jaccard of two masks that are independent inside each cell (plug-in of the mean)."""
    a, b = flat(first), flat(second)
    _, cell = np.unique(cells, return_inverse=True)
    in_a, in_b = np.bincount(cell, weights=a), np.bincount(cell, weights=b)
    both = float((in_a * in_b / np.bincount(cell)).sum())
    return both / (float(a.sum()) + float(b.sum()) - both)


def jaccard(first: Masks, second: Masks) -> float:
    assert list(first) == list(second)
    a, b = flat(first), flat(second)
    return float((a & b).sum() / (a | b).sum())


def binades(base: BitArrays) -> npt.NDArray[np.int64]:
    """floor(log2 |w|) of every base element, from the bfloat16 exponent field."""
    fields = [(base[name].ravel() >> 7) & 0xFF for name in base]
    return np.concatenate(fields).astype(np.int64) - 127


def overlap_line(label: str, first: Masks, second: Masks, base: BitArrays) -> str:
    """Observed Jaccard beside three nulls: independence over the model, in a tensor, in a cell."""
    assert list(first) == list(base)
    tensor = np.repeat(np.arange(len(base)), [base[name].size for name in base])
    nulls = (np.zeros_like(tensor), tensor, tensor * 1024 + binades(base))
    values = "".join(f"{expected_jaccard(first, second, cells):10.4f}" for cells in nulls)
    return f"{label:34s}{jaccard(first, second):10.4f}{values}"


def measure(checkpoints: Path, updates: dict[str, Weights], master: Weights, log: Log) -> None:
    """Count what the saved files say, then two controls that need the float32 updates."""
    names = ["rl_seed1", "rl_seed2", "sft"]
    base = load_bits(checkpoints / "base")
    base_fp32 = load_bits(checkpoints / "base_fp32")
    tuned_fp32 = load_bits(checkpoints / "rl_seed1_fp32")
    tuned = {name: load_bits(checkpoints / name) for name in names}
    for name in base:
        assert np.array_equal(to_bf16(base_fp32[name]), base[name]), name
        assert np.array_equal(to_bf16(tuned_fp32[name]), tuned["rl_seed1"][name]), name
    log("base and rl_seed1 are the nearest-even roundings of base_fp32 and rl_seed1_fp32: yes")

    masks = {name: changed(base, tuned[name]) for name in names}
    float_mask = changed(base_fp32, tuned_fp32)
    log("\ndensity (changed / elements, bit patterns differ)")
    for name in names:
        log(f"  {name:14s} bfloat16 files  {density(masks[name]):.4f}")
    log(f"  {'rl_seed1':14s} float32 files   {density(float_mask):.4f}")

    log("\ndensity by kind of tensor" + "".join(f"{name:>12s}" for name in [*names, "rl1 fp32"]))
    kinds = sorted({name.split(".")[-2] for name in base})
    for kind in kinds:
        row = [
            np.concatenate([m[name].ravel() for name in m if name.split(".")[-2] == kind]).mean()
            for m in (*masks.values(), float_mask)
        ]
        log(f"  {kind:23s}" + "".join(f"{value:12.4f}" for value in row))

    log("\ndensity by |w| of the base   elements" + "".join(f"{name:>12s}" for name in names))
    exponent = binades(base)
    edges = [-200, -12, -10, -8, -7, -6, -5, -4, -3, -2, -1, 200]
    for low, high in pairwise(edges):
        inside = (exponent >= low) & (exponent < high)
        if not inside.any():
            continue
        left = "0" if low == -200 else f"2^{low}"
        right = "inf" if high == 200 else f"2^{high}"
        shares = [flat(masks[name])[inside].mean() for name in names]
        row_text = "".join(f"{value:12.4f}" for value in shares)
        log(f"  [{left:>5s}, {right:>5s})          {inside.sum():10d}{row_text}")

    log("\nsize of the float32 update, |tuned - base|")
    for name in names:
        size = np.abs(np.concatenate([u.numpy().ravel() for u in updates[name].values()]))
        low, middle, high = np.quantile(size, [0.1, 0.5, 0.9])
        log(
            f"  {name:14s} 10% {low:.2e}  median {middle:.2e}  90% {high:.2e}"
            f"  max {size.max():.2e}  zero {np.mean(size == 0):.4f}"
        )

    log(f"\n{'Jaccard of the bfloat16 masks':34s}  observed   expected if independent over/in each")
    log(f"{'':34s}{'':10s}     model    tensor    tensor and binade of |w|")
    for one, other in (("rl_seed1", "rl_seed2"), ("rl_seed1", "sft"), ("rl_seed2", "sft")):
        log(overlap_line(f"  {one}, {other}", masks[one], masks[other], base))

    # Control 1: all runs start from the same float32 weights, so a weight that happens to lie next
    # to a rounding boundary flips easily in every run. Adding the same updates to the *rounded*
    # base takes that shared head start away.
    start = {name: master[name].bfloat16().float() for name in master}
    centred = {run: round_masks(start, updates[run]) for run in names}
    # Control 2: seed 2's update with its values shuffled inside each tensor knows nothing of which
    # weight is which. What overlap is left comes from the weights, not from the training.
    generator = torch.Generator().manual_seed(0)
    shuffled = {
        name: value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)
        for name, value in updates["rl_seed2"].items()
    }
    first, second, third = (centred[run] for run in names)
    log("the same, updates added to the rounded base")
    log(overlap_line("  rl_seed1, rl_seed2", first, second, base))
    log(overlap_line("  rl_seed1, sft", first, third, base))
    log("control: rl_seed2's update shuffled inside each tensor")
    control = round_masks(master, shuffled)
    log(overlap_line("  rl_seed1, shuffled", masks["rl_seed1"], control, base))
    log(overlap_line("  the same, on the rounded base", first, round_masks(start, shuffled), base))
    values = "  ".join(f"{run} {density(centred[run]):.4f}" for run in names)
    log(f"density with the updates added to the rounded base: {values}")


def round_masks(start: Weights, update: Weights) -> Masks:
    """Which elements differ in bfloat16 once ``update`` is added to ``start`` in float32."""

    def bits(value: Tensor) -> npt.NDArray[Any]:
        stored: npt.NDArray[Any] = value.bfloat16().view(torch.uint16).numpy()
        return stored

    return {name: bits(start[name]) != bits(start[name] + update[name]) for name in sorted(start)}


# ------------------------------------------------------------------------------------ everything


def run(out: Path, recipe: Recipe, log: Log) -> None:
    checkpoints = out / "checkpoints"
    log(
        f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"safetensors {safetensors.__version__}, one thread"
    )
    log(str(recipe))
    task = Task(recipe.split_seed)
    test = task.test(recipe.held_out, seed=1)
    model = SortModel(recipe)
    model.initialise(recipe.init_std, recipe.init_seed)
    log(f"parameters: {sum(p.numel() for p in model.parameters())}")
    log(f"held-out prompts: {len(test)}, from multisets that training never sees")

    train_base(model, task, recipe, log)
    master = snapshot(model)
    base_right, base_reward = report("base", model, test, None, log)

    runs: dict[str, Callable[[], None]] = {
        "rl_seed1": lambda: train_rl(model, task, recipe, 1, log),
        "rl_seed2": lambda: train_rl(model, task, recipe, 2, log),
        "sft": lambda: train_sft(model, task, recipe, 3, log),
    }
    weights: dict[str, Weights] = {"base": master}
    for name, train in runs.items():
        log()
        model.load_state_dict(master)
        report(f"{name} before", model, test, None, log)
        train()
        weights[name] = snapshot(model)
        report(f"{name} after", model, test, (base_right, base_reward), log)

    log("\nsaved checkpoints")
    for name, value in weights.items():
        save({key: v.bfloat16() for key, v in value.items()}, checkpoints / name)
    save(weights["base"], checkpoints / "base_fp32")
    save(weights["rl_seed1"], checkpoints / "rl_seed1_fp32")
    for name in (*weights, "base_fp32", "rl_seed1_fp32"):
        data = (checkpoints / name / "model.safetensors").read_bytes()
        log(f"  {name:14s} {len(data):8d} bytes  sha256 {hashlib.sha256(data).hexdigest()}")
    log("the bfloat16 files, evaluated as they are stored (arithmetic in float32)")
    for name in weights:
        stored = load_file(checkpoints / name / "model.safetensors")
        model.load_state_dict({key: v.float() for key, v in stored.items()})
        report(f"{name} bf16", model, test, None, log)
    log()
    updates = {
        name: {key: weights[name][key] - master[key] for key in master}
        for name in weights
        if name != "base"
    }
    measure(checkpoints, updates, master, log)
    log(f"\ndone in {log.seconds()}")


def report(
    label: str,
    model: SortModel,
    test: Tensor,
    before: tuple[Tensor, Tensor] | None,
    log: Log,
) -> tuple[Tensor, Tensor]:
    """Log held-out accuracy and expected reward; with ``before``, the paired change too."""
    right, reward = evaluate(model, test)
    line = f"{label:16s} held-out accuracy {right.float().mean():.4f}  reward {reward.mean():.4f}"
    if before is not None:
        gain = reward - before[1]
        line += (
            f"  reward gain {gain.mean():+.4f} (standard error {gain.std() / len(gain) ** 0.5:.4f})"
            f"  fixed {int((right & ~before[0]).sum())} broken {int((~right & before[0]).sum())}"
        )
    log(line)
    return right, reward


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny checkpoints of this example.")
    parser.add_argument("--out", type=Path, required=True, help="where to write log and weights")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "train.log", "w", encoding="utf-8") as file:
        run(out, Recipe(), Log(file))


if __name__ == "__main__":
    main()

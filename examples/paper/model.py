"""A small Llama-shaped transformer: the same tensors under the same names, in a few lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 13  #: ten digits, "=", and a token for each task
LONGEST = 14  #: tokens of a prompt and its answer


@dataclass(frozen=True)
class Shape:
    """How large a model is."""

    width: int
    layers: int
    heads: int
    mlp: int


#: ``small`` is what the runs use, ``large`` has ten times the weights, ``tiny`` is for tests
SHAPES = {
    "tiny": Shape(32, 2, 2, 64),
    "small": Shape(128, 4, 4, 352),
    "large": Shape(400, 4, 4, 1136),
}

Cache = list[tuple[Tensor, Tensor]]  #: keys and values of each layer, (batch, heads, length, size)


class Norm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, eps=1e-6)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: halves of each head are the two coordinates."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention, with a cache while sampling."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, width = x.shape
        q, k, v = (
            project(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        # with a cache there is one new token, which may look at everything
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, width))
        return out, (k, v)


class Mlp(nn.Module):
    """The gated MLP of Llama."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.width)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.width)
        self.mlp = Mlp(shape)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        seen, kept = self.self_attn(self.input_layernorm(x), cos, sin, past)
        x = x + seen
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)


class Model(nn.Module):
    """The whole model. ``outputs`` is the vocabulary, or 1 for a critic."""

    def __init__(self, shape: Shape, outputs: int = VOCABULARY) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.width, outputs, bias=False)
        size = shape.width // shape.heads
        speeds = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(LONGEST), speeds)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits, (batch, length, outputs), of tokens (batch, length).

        ``cache`` is filled when it is empty, and continued otherwise, by one token at a time.
        """
        start = cache[0][0].shape[2] if cache else 0
        cos, sin = (each[start : start + tokens.shape[1]] for each in (self.cos, self.sin))
        x = self.model.embed_tokens(tokens)
        kept: Cache = []
        for number, layer in enumerate(self.model.layers):
            x, pair = layer(x, cos, sin, cache[number] if cache else None)
            kept.append(pair)
        if cache is not None:
            cache[:] = kept
        out: Tensor = self.lm_head(self.model.norm(x))
        return out


def seeded(seed: int) -> torch.Generator:
    """Random numbers of our own, on the device that new tensors are made on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def new_model(shape: Shape, seed: int) -> Model:
    """A model with random matrices."""
    model = Model(shape)
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02, generator=generator)
    return model


def model_of(shape: Shape, weights: dict[str, Tensor]) -> Model:
    """A float32 model with these weights."""
    model = Model(shape)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def answer_logits(model: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    """Logits, float32 (batch, answer, outputs), where each token of the answers is said."""
    tokens = torch.cat((prompts, answers[:, :-1]), 1)
    logits: Tensor = model(tokens)[:, prompts.shape[1] - 1 :]
    return logits.float()


def log_probabilities(model: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    """log π(answer token | what is before it), float32 (batch, answer)."""
    logs = answer_logits(model, prompts, answers).log_softmax(-1)
    return logs.gather(2, answers[:, :, None]).squeeze(2)


@torch.no_grad()
def sample(
    model: nn.Module, prompts: Tensor, length: int, times: int, generator: torch.Generator
) -> Tensor:
    """``times`` answers to each prompt at temperature 1, side by side: (prompts·times, length)."""
    cache: Cache = []
    logits = model(prompts, cache)[:, -1].repeat_interleave(times, 0)
    cache = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in cache]
    tokens: list[Tensor] = []
    while True:
        chances = logits.float().softmax(-1)
        tokens.append(torch.multinomial(chances, 1, generator=generator))
        if len(tokens) == length:
            return torch.cat(tokens, 1)
        logits = model(tokens[-1], cache)[:, -1]

"""Random small transformers, put together from the spellings of their parts that published models use."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.graphs import SPEC, VOCAB

HEADS, HEAD_DIM = 4, 4
WIDTH, HIDDEN = HEADS * HEAD_DIM, 12
ANGLES = torch.outer(torch.arange(float(SPEC.max_positions)), torch.tensor([1.0, 0.3]))


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def llada_norm(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(enabled=False, device_type=x.device.type):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        normed = wide.to(x.dtype)
    return weight * normed


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "llama": llama_norm,
    "llada": llada_norm,
    "quotient": lambda x, weight: x / torch.sqrt(torch.mean(x * x, -1, True) + 1e-5) * weight,
    "torch": lambda x, weight: F.rms_norm(x, (WIDTH,), weight, 1e-5),
    "layer": lambda x, weight: F.layer_norm(x, (WIDTH,), weight, None, 1e-5),
}


def by_slices(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def by_unbind(x: Tensor) -> Tensor:
    first, second = x.view(*x.shape[:-1], 2, x.shape[-1] // 2).unbind(dim=-2)
    return torch.cat((-second, first), dim=-1)


def in_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (first, second), cos, sin = x.chunk(2, dim=-1), cos[..., : HEAD_DIM // 2], sin[..., : HEAD_DIM // 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


ROTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "slices": lambda x, cos, sin: x * cos + by_slices(x) * sin,
    "unbind": lambda x, cos, sin: ((x.float() * cos) + (by_unbind(x.float()) * sin)).type_as(x),
    "halves": in_halves,
}

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

REPEATS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "interleave": lambda x, times: x.repeat_interleave(times, dim=1),
    "expand": lambda x, times: x[:, :, None].expand(-1, -1, times, -1, -1).reshape(1, HEADS, -1, HEAD_DIM),
    "flag": lambda x, times: x,
}


@dataclass(frozen=True)
class Pieces:
    """What a module is put together from.

    positions: "table" or "lookup" of a learned table, a rotation with the tables "sliced", or "angles" of arange.
    mlp: "gated", "gated in one" projection, or "plain".
    """

    norm: str
    positions: str
    rotation: str
    gate: str
    mlp: str
    repeat: str
    kv_heads: int
    by_token: bool
    biases: bool
    tied: bool
    scale: float
    layers: int
    post_norm: bool
    shifted: bool
    seed: int


def pieces() -> st.SearchStrategy[Pieces]:
    """Any of them together."""
    choices = {
        "norm": NORMS,
        "positions": ("table", "lookup", "sliced", "sliced", "angles"),
        "rotation": ROTATIONS,
        "gate": GATES,
        "mlp": ("gated", "gated in one", "plain"),
        "repeat": REPEATS,
        "kv_heads": (1, 2, HEADS),
        "scale": (1.0, 0.25),
        "layers": (1, 2),
        "seed": range(1000),
    }
    given = {
        f.name: st.sampled_from(list(choices[f.name])) if f.name in choices else st.booleans() for f in fields(Pieces)
    }
    return st.builds(Pieces, **given)


class Layer(nn.Module):
    def __init__(self, of: Pieces) -> None:
        super().__init__()
        self.of = of
        kv_width = of.kv_heads * HEAD_DIM
        self.q, self.o = (nn.Linear(WIDTH, WIDTH, bias=of.biases) for _ in range(2))
        self.k, self.v = (nn.Linear(WIDTH, kv_width, bias=of.biases) for _ in range(2))
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN, bias=of.biases)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=of.biases) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=of.biases)
        self.first, self.second = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        norm = NORMS[self.of.norm]
        if self.of.post_norm:
            x = norm(x + self.attention(x, cos, sin), self.first)
            return norm(x + self.mlp(x), self.second)
        x = x + self.attention(norm(x, self.first), cos, sin)
        return x + self.mlp(norm(x, self.second))

    def attention(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        of, t = self.of, x.shape[1]
        q = self.q(x).view(1, t, HEADS, HEAD_DIM)
        k, v = (p(x).view(1, t, of.kv_heads, HEAD_DIM) for p in (self.k, self.v))
        if of.by_token:
            q, k = self.rotated(q, cos, sin, 1), self.rotated(k, cos, sin, 1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if not of.by_token:
            q, k = self.rotated(q, cos, sin, 0), self.rotated(k, cos, sin, 0)
        if of.kv_heads < HEADS:
            k, v = (REPEATS[of.repeat](part, HEADS // of.kv_heads) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=of.kv_heads < HEADS and of.repeat == "flag")
        return self.o(y.transpose(1, 2).contiguous().view(1, t, WIDTH))

    def rotated(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, heads_axis: int) -> Tensor:
        if cos is None or sin is None:
            return x
        cos, sin = (table[:, :, None] if heads_axis else table[:, None] for table in (cos, sin))
        return ROTATIONS[self.of.rotation](x, cos, sin)

    def mlp(self, x: Tensor) -> Tensor:
        gate = GATES[self.of.gate]
        if self.of.mlp == "plain":
            return self.down(gate(self.up(x)))
        first, second = (
            self.gate_up(x).chunk(2, dim=-1) if self.of.mlp == "gated in one" else (self.gate(x), self.up(x))
        )
        return self.down(gate(first) * second)


class Module(nn.Module):
    """Token ids [1, T] -> logits [1, T, VOCAB]."""

    def __init__(self, of: Pieces) -> None:
        super().__init__()
        self.of = of
        self.embed, self.learned = nn.Embedding(VOCAB, WIDTH), nn.Embedding(SPEC.max_positions, WIDTH)
        self.layers = nn.ModuleList(Layer(of) for _ in range(of.layers))
        self.last = nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB, bias=of.biases)
        if of.tied:
            self.head.weight = self.embed.weight
        for name, table in (("cos", ANGLES.cos()), ("sin", ANGLES.sin())):
            self.register_buffer(name, torch.cat((table, table), dim=-1)[None], persistent=False)
        self.register_buffer("frequencies", ANGLES[1].clone(), persistent=False)
        generator = torch.Generator().manual_seed(of.seed)
        with torch.no_grad():
            for parameter in self.parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * 2 / WIDTH**0.5 if parameter.ndim > 1 else 1 + drawn / 4)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        t = token_ids.shape[1]
        cos = sin = None
        if self.of.positions == "table":
            x = x + self.learned.weight[:t]
        elif self.of.positions == "lookup":
            x = x + self.learned(torch.arange(t)[None])
        elif self.of.positions == "sliced":
            cos, sin = self.cos[:, :t], self.sin[:, :t]
        else:
            angles = torch.arange(t)[None, :, None].float() * self.frequencies
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(NORMS[self.of.norm](x, self.last))
        return logits if self.of.scale == 1 else logits * self.of.scale

"""A module of two layers, and passes that break it: what the tests of the checks between passes share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dllmc.ir.provenance import layer_of
from dllmc.ir.step_graph import StepGraph
from dllmc.passes import pipeline
from dllmc.passes.base import Pass, PassResult
from dllmc.spec import ModelSpec

VOCAB, WIDTH, HEAD_DIM = 13, 8, 4
SPEC = ModelSpec(VOCAB, 0, (), max_positions=32)
ANGLES = torch.outer(torch.arange(32.0), torch.tensor([1.0, 0.1, 1.0, 0.1]))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        variance = wide.pow(2).mean(-1, keepdim=True) + 1e-6
        return self.weight * (wide * torch.rsqrt(variance)).to(x.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, HEAD_DIM)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y))
        first, second = q.chunk(2, dim=-1)
        q = q * cos + torch.cat((-second, first), dim=-1) * sin
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """Two layers of a small transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = Norm()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("cos", ANGLES.cos(), persistent=False)
        self.register_buffer("sin", ANGLES.sin(), persistent=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.mul_(1.5 if "layers" in name and parameter.ndim == 2 else 1)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x)) / 2


@dataclass(frozen=True)
class Broken(Pass):
    """A pass that does what a test gives it."""

    name = "broken"
    rewrite: Callable[[StepGraph], object] = lambda step: None

    def run(self, step: StepGraph) -> PassResult:
        self.rewrite(step)
        return PassResult(True)


def until(name: str) -> tuple[Pass, ...]:
    """The default pipeline up to a pass."""
    return pipeline.up_to(pipeline.parse(pipeline.DEFAULT_PIPELINE), name)


def calls(step: StepGraph, target: object, layer: int | None = None) -> list[fx.Node]:
    """The calls of an operator, in one of the layers only if it is given."""
    return [node for node in step.calls(target) if layer is None or layer_of(node) == f"layers.{layer}"]

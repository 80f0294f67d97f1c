"""Deep modules, whose layers a graph repeats, and graphs of calls written by hand."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllmc.ir.trace import Call
from tests.graphs import VOCAB, WIDTH


class Block(nn.Module):
    """x [1, T, WIDTH] -> x + up(norm(x)), or with an activation."""

    def __init__(self, activated: bool = False) -> None:
        super().__init__()
        self.norm, self.up = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x))
        if self.activated:
            h = F.silu(h)
        return x + h


class Stack(nn.Module):
    """An embedding, blocks one after the other, and a head."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def call(name: str, arguments: str = "", layer: str = "", operator: str = "op", type: str = "float32[2]") -> Call:
    """A call that writes 8 bytes."""
    return Call(name, operator, arguments, type, 8, False, layer, "")

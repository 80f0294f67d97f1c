"""A hand-written program on a GPU equals eager mode on a CPU: called, recorded and replayed, at several sizes."""

import pytest
import torch

from dllmc.ir.program import Program
from dllmc.runtime.arena import Memory
from dllmc.runtime.cuda import Stream
from dllmc.runtime.graphs import GraphExecutor
from tests.programs import planned
from tests.runtime.test_executor import hand_written, weights
from tests.runtime.test_graphs import check

pytestmark = pytest.mark.gpu

__all__ = ["weights"]


def executor_of(program: Program, weights: dict[str, torch.Tensor]) -> GraphExecutor:
    memory = Memory([program], {name: weight.cuda() for name, weight in weights.items()}, "cuda")
    return GraphExecutor(program, memory, Stream(memory.device, memory.tensors()))


def test_steps_of_several_sizes_by_turns(weights: dict[str, torch.Tensor]) -> None:
    executor = executor_of(planned(hand_written()), weights)
    for seed in range(6):
        for tokens, rows in ((5, 2), (9, 5), (1, 1)):
            check(executor, weights, tokens, rows, seed)
    assert len(executor._graphs) == 3

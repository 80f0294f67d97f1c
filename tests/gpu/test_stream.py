"""A hand-written program on a GPU equals eager mode on a CPU: called, recorded and replayed, at several sizes."""

import pytest
import torch

from dllmc.errors import ProgramError
from dllmc.ir.program import Program
from dllmc.runtime.arena import Memory
from dllmc.runtime.graphs import GraphExecutor, executors
from tests.programs import planned
from tests.runtime.test_executor import hand_written, step_of, weights
from tests.runtime.test_graphs import check

pytestmark = pytest.mark.gpu

__all__ = ["weights"]


def executor_of(program: Program, weights: dict[str, torch.Tensor]) -> GraphExecutor:
    memory = Memory([program], {name: weight.cuda() for name, weight in weights.items()}, "cuda")
    found = executors({program.name: program}, memory)[program.name]
    assert isinstance(found, GraphExecutor)
    return found


def test_steps_of_several_sizes_by_turns(weights: dict[str, torch.Tensor]) -> None:
    executor = executor_of(planned(hand_written()), weights)
    for seed in range(6):
        for tokens, rows in ((5, 2), (9, 5), (1, 1)):
            check(executor, weights, tokens, rows, seed)
    assert len(executor._graphs) == 3


def test_what_waits_for_the_gpu_cannot_be_recorded(
    weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names program and shape; nothing goes on silently without a graph."""
    executor = executor_of(planned(hand_written()), weights)
    executor.run(*step_of(5, 2))
    binding = next(iter(executor._bindings.values()))
    monkeypatch.setattr(binding, "calls", [*binding.calls, torch.cuda.synchronize])
    with pytest.raises(ProgramError, match="cannot be recorded as a CUDA graph"):
        executor.run(*step_of(5, 2))

"""plan-memory: every buffer gets bytes that nothing else uses while it is alive."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.errors import PassError
from dllmc.ir.program import ALIGNMENT_BYTES, Instruction, View
from dllmc.ir.step_graph import StepGraph
from dllmc.passes.pipeline import DEFAULT_PIPELINE
from tests.graphs import Tiny, execute, execute_program, heads_of, run, run_all, step_inputs, step_of


def layers(module: Tiny, x: Tensor) -> Tensor:
    """Attention and a feed-forward part, each added to the residual stream, twice."""
    for _ in range(2):
        q, k, v = (heads_of(t) for t in module.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        gate, up, _ = module.qkv(x).chunk(3, -1)
        x = x + F.silu(gate) * up
    return x


@pytest.fixture(scope="module")
def planned() -> StepGraph:
    """A step through the default pipeline, `plan-memory` at its end."""
    return run_all(step_of(layers))


def used(instruction: Instruction) -> set[str]:
    """Names of everything that an instruction reads, writes or works in."""
    operands = [o for item in instruction.inputs for o in (item if isinstance(item, tuple) else (item,))]
    names = {view.base for view in (*operands, *instruction.outputs) if isinstance(view, View)}
    return names | ({instruction.workspace} if instruction.workspace else set())


def test_buffers_alive_together_do_not_overlap(planned: StepGraph) -> None:
    """From the first instruction that uses a buffer to the last, or to the end if it is returned."""
    program = planned.program
    assert program is not None
    assert program.arena_bytes is not None
    returned = {view.base for view in program.outputs.values()}
    spans = {}
    for name, buffer in program.buffers.items():
        uses = [i for i, instruction in enumerate(program.instructions) if name in used(instruction)]
        last = len(program.instructions) if name in returned else uses[-1] + 1
        assert buffer.lifetime == (uses[0], last), name
        assert buffer.offset is not None
        assert buffer.offset % ALIGNMENT_BYTES == 0
        end = buffer.offset + buffer.size_bytes(program.maxima)
        assert end <= program.arena_bytes
        spans[name] = range(uses[0], last), range(buffer.offset, end)
    for (a, (when_a, where_a)), (b, (when_b, where_b)) in combinations(spans.items(), 2):
        together = max(when_a.start, when_b.start) < min(when_a.stop, when_b.stop)
        overlap = max(where_a.start, where_b.start) < min(where_a.stop, where_b.stop)
        assert not (together and overlap), f"{a} and {b} share bytes while both are alive"


def test_the_arena_is_smaller_than_its_buffers(planned: StepGraph) -> None:
    """Buffers reuse each other's bytes, though never below the bound that no plan beats."""
    program = planned.program
    assert program is not None
    assert program.arena_bytes is not None
    assert program.lower_bound_bytes is not None
    total = sum(buffer.size_bytes(program.maxima) for buffer in program.buffers.values())
    assert program.lower_bound_bytes <= program.arena_bytes < total


def test_reused_bytes_do_not_change_results(planned: StepGraph) -> None:
    """The program over its arena gives what the graph gives with memory of its own for each value, at any size."""
    for lengths in ((5, 7), (2,), (16, 16, 16, 16)):
        inputs = step_inputs(*lengths, rows=(1, 0))
        expected, found = execute(planned, inputs), execute_program(planned, inputs)
        assert torch.equal(found["token"], expected["token"])
        torch.testing.assert_close(found["confidence"], expected["confidence"], rtol=0, atol=1e-5)


def test_planning_does_not_modify_the_graph() -> None:
    """The program changes, the graph does not; the statistics are those of the program."""
    step = step_of(lambda m, x: x.exp())
    entry = run(step, DEFAULT_PIPELINE.removesuffix(",specialize-phase"))
    assert not entry.modified
    assert step.program is not None
    assert entry.stats["arena_bytes"] == step.program.arena_bytes
    assert entry.stats["bound_bytes"] == step.program.lower_bound_bytes
    assert entry.stats["buffers_bytes"] >= entry.stats["arena_bytes"]


def test_a_step_without_a_program_cannot_be_planned() -> None:
    """The pipeline says what is missing, and which pass would make it."""
    with pytest.raises(PassError, match=r"'plan-memory' requires lowered, .* would do: .*,lower,plan-memory"):
        run(step_of(lambda m, x: x), "plan-memory")

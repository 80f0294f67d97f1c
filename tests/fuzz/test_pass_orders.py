"""Random modules, compiled by random passes in random orders that their facts allow, against the eager module."""

from dataclasses import replace

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dllmc.passes import order, pipeline
from dllmc.passes.base import Pass
from dllmc.passes.chunk_activations import ChunkActivations
from dllmc.passes.fit_budget import FitBudget
from dllmc.passes.pack_tokens import PackTokens
from dllmc.passes.plan_memory import PlanMemory
from dllmc.passes.remove_noops import RemoveNoops
from dllmc.passes.reuse_in_place import ReuseInPlace
from tests.fuzz.modules import Module, Pieces, pieces
from tests.graphs import MAXIMA, SPEC, captured, execute_program, step_inputs

# Without these there is no program; each of the others may be left out, or come several times.
NEEDED = (
    "inline-regions",
    "remove-noops",
    "classify-masks",
    "lift-positions",
    "pack-tokens",
    "select-logit-rows",
    "fuse-head",
    "lower",
    "plan-memory",
)
OPTIONAL = tuple(name for name in pipeline.REGISTRY if name not in NEEDED)

# Passes that look at a graph as one sequence of calls, and take what they compute alike from one loop to another.
BEFORE_LOOPS = ("fold-constants", "remove-noops", "respell-linears")

# A token is compared where its logit leads by more than rounding makes.
CLEAR = 1e-3


@st.composite
def orders(draw: st.DrawFn) -> tuple[Pass, ...]:
    """The passes that are needed and some of the others, each behind those that ensure what it requires."""
    chosen = [name for name in OPTIONAL if draw(st.sampled_from((True, True, False)))]
    chosen += draw(st.lists(st.sampled_from(OPTIONAL), max_size=2))
    passes = [pipeline.lookup(name)() for name in (*NEEDED, *chosen)]
    chunk = draw(st.integers(0, 9))
    passes = [ChunkActivations(chunk) if type(p) is ChunkActivations else p for p in passes]
    facts: nx.DiGraph[type[Pass]] = order.dependencies({type(p) for p in passes})
    facts.add_edge(RemoveNoops, PackTokens)  # which refuses conversions and copies as it does any call it does not know
    facts.add_edges_from((p, PlanMemory) for p in (ReuseInPlace, FitBudget))  # which undo a plan
    facts.add_edges_from((pipeline.lookup(name), ChunkActivations) for name in BEFORE_LOOPS)
    placed: list[Pass] = []
    while passes:
        left = {type(p) for p in passes}
        ready = [i for i, p in enumerate(passes) if not left & set(facts.predecessors(type(p)))]
        placed.append(passes.pop(draw(st.sampled_from(ready))))
    return tuple(placed)


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Tensor]:
    """The inputs of a greedy step over a few segments, of each some tokens wanted."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=MAXIMA["segments"]))
    rows = draw(st.lists(st.integers(0, sum(lengths) - 1), min_size=1, max_size=MAXIMA["rows"], unique=True))
    return step_inputs(*lengths, rows=sorted(rows), seed=draw(st.integers(0, 99)))


@torch.no_grad()
def eager(module: nn.Module, inputs: dict[str, Tensor], shifted: bool) -> Tensor:
    """The logits [rows, VOCAB] in float64 arithmetic of the module on each segment alone."""
    alone = [module(inputs["token_ids"][None, start:end])[0] for start, end in inputs["segments"].tolist()]
    rows = inputs["rows"]
    if shifted:
        rows = rows - (inputs["positions"][rows] > 0).long()
    return torch.cat(alone)[rows].double()


def check(max_examples: int) -> None:
    """Compile that many modules, each in an order of its own."""

    @settings(
        deadline=None,
        derandomize=True,
        max_examples=max_examples,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(pieces(), orders(), steps())
    def compare(of: Pieces, passes: tuple[Pass, ...], inputs: dict[str, Tensor]) -> None:
        note(pipeline.text_of(passes))
        module = Module(of).eval()
        step = captured(module, replace(SPEC, shifted=of.shifted))
        pipeline.run(step, passes)
        found = execute_program(step, inputs)
        logits = eager(module, inputs, of.shifted)
        best = logits.topk(2, dim=-1)
        clear = best.values[:, 0] - best.values[:, 1] > CLEAR
        assert torch.equal(found["token"][clear], best.indices[clear, 0])
        logprob = logits.log_softmax(dim=-1).amax(dim=-1).float()
        torch.testing.assert_close(found["logprob"], logprob, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["confidence"], logprob.exp(), rtol=1e-4, atol=1e-4)

    compare()


def test_any_order_computes_what_the_module_does_on_a_sample() -> None:
    """Fusions before packing or behind the head, passes left out or run twice: the program's outputs are the same."""
    check(max_examples=6)


@pytest.mark.slow
def test_any_order_computes_what_the_module_does() -> None:
    """The same over many modules and orders."""
    check(max_examples=100)

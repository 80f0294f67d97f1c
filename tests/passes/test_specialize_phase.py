"""specialize-phase: programs for steps that need a part of the whole one, in the same arena."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllmc.compiler import CompileOptions, rewrite
from dllmc.errors import PassError
from dllmc.ir.program import ForRows, Program
from dllmc.ir.step_graph import StepGraph
from dllmc.memory.verifier import verify
from dllmc.passes import pipeline
from dllmc.passes.specialize_phase import SpecializePhase
from dllmc.passes.verify import random_inputs
from tests.passes.two_layers import SPEC, Model
from tests.programs import executor_of

OPTIONS = CompileOptions(max_tokens_per_step=64, max_requests=4, max_logit_rows=16)
SIZED_BY = {
    "tokens": "token_ids",
    "rows": "row_segment",
    "guided": "guided",
    "segments": "segments",
    "active": "active",
}
IN_CHUNKS = pipeline.DEFAULT_PIPELINE.replace("chunk-activations", "chunk-activations{chunk=5}")


def compiled(passes: str = pipeline.DEFAULT_PIPELINE) -> StepGraph:
    return rewrite(Model(), SPEC, replace(OPTIONS, passes=passes))[0]


def run(step: StepGraph, program: Program, inputs: dict[str, Tensor], caches: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a program returns, and the caches behind it, by name; those that it has not are as they were."""
    executor = executor_of(program, {name: step.tensors[name] for name in program.weights})
    pages = {"pages": program.maxima.get("pages", 0)}
    for name in program.caches:
        part = executor.memory.tensor(program, name, pages)
        part[:, :, : caches[name].shape[2]].copy_(caches[name])
    sizes = {symbol: len(inputs[name]) for symbol, name in SIZED_BY.items()}
    outputs = executor.run(sizes, {name: value.numpy() for name, value in inputs.items()})
    found = {name: torch.from_numpy(value.copy()) for name, value in outputs.items()}
    for name, before in caches.items():
        held = name in program.caches
        found[name] = executor.memory.tensor(program, name, pages)[:, :, : before.shape[2]].clone() if held else before
    return found


def without(inputs: dict[str, Tensor], writes: bool, reads: bool) -> dict[str, Tensor]:
    """The same step without a Refresh, or without Reuse."""
    if not writes:
        inputs = inputs | {"keeping": torch.zeros_like(inputs["keeping"]), "active": inputs["active"][:0]}
    return inputs if reads else inputs | {"cached": torch.zeros_like(inputs["cached"])}


@pytest.mark.parametrize("passes", [pipeline.DEFAULT_PIPELINE, IN_CHUNKS], ids=["all at once", "in chunks"])
@pytest.mark.parametrize(
    ("phase", "writes", "reads"), [("dense", False, False), ("refresh", True, False), ("reuse", False, True)]
)
def test_a_phase_computes_what_the_whole_program_does(passes: str, phase: str, writes: bool, reads: bool) -> None:
    """On steps that need no more than the phase has, to the bit; caches too."""
    step = compiled(passes)
    assert step.program is not None
    everything = random_inputs(step, (5, 9, 4))
    caches = {name: value for name, value in everything.items() if name.startswith("cache.")}
    inputs = without({name: value for name, value in everything.items() if name not in caches}, writes, reads)
    expected = run(step, step.program, inputs, caches)
    found = run(step, step.phases[phase], inputs, caches)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert writes == any(not torch.equal(expected[name], caches[name]) for name in caches)


@pytest.mark.parametrize("passes", [pipeline.DEFAULT_PIPELINE, IN_CHUNKS], ids=["all at once", "in chunks"])
def test_phases_are_sound_and_need_no_larger_arena(passes: str) -> None:
    step = compiled(passes)
    assert step.program is not None
    assert list(step.phases) == ["dense", "refresh", "reuse"]
    for name, part in step.phases.items():
        verify(part)
        assert part.name == name
        assert (part.arena_bytes or 0) <= (step.program.arena_bytes or 0)
        assert part.weights.items() <= step.program.weights.items()
        assert part.inputs.items() <= step.program.inputs.items()


def test_what_only_a_refresh_needs_goes() -> None:
    """The gathers of active spans, their queries in the last layer, and the tables."""
    step = compiled()
    dense, refresh, reuse = step.phases.values()
    counts = [len(list(part.calls())) for part in (dense, refresh, reuse)]
    assert counts[0] == counts[2] < counts[1]
    assert refresh.inputs.keys() - dense.inputs.keys() == {"active", "keeping", "page_table"}
    assert reuse.inputs.keys() - dense.inputs.keys() == {"cached", "page_table"}
    assert not dense.caches
    assert "pages" not in dense.maxima
    assert refresh.caches == reuse.caches


def test_a_loop_of_which_nothing_is_needed_goes() -> None:
    """In chunks the active spans' queries are made in loops of their own."""
    step = compiled(IN_CHUNKS)
    loops = {
        name: [str(item.extent) for item in part.instructions if isinstance(item, ForRows)]
        for name, part in step.phases.items()
    }
    assert "active" in loops["refresh"]
    assert "active" not in loops["dense"] + loops["reuse"]
    assert all(item.body for part in step.phases.values() for item in part.instructions if isinstance(item, ForRows))


def test_a_program_without_caches_has_one_phase() -> None:
    step = compiled(pipeline.DEFAULT_PIPELINE.replace("cache-kv,", ""))
    assert step.program is not None
    assert step.program.name == "dense"
    assert not step.phases


def test_it_needs_a_plan() -> None:
    with pytest.raises(PassError, match="pass 'specialize-phase' requires planned"):
        compiled("specialize-phase")
    assert str(SpecializePhase()) == "specialize-phase"

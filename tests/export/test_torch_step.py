"""A program as torch calls computes what the program does, in all of its phases; so do its parts alone."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmc.artifact import Artifact
from dllmc.export.parts import in_parts
from dllmc.export.torch_step import TorchStep, exported
from dllmc.export.views import window, written
from dllmc.export.whole import without_loops
from dllmc.ir.program import Affine, Instruction, View, element_count
from tests.export.models import compiled
from tests.export.steps import DENSE_CASES, agree


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compiled(tmp_path_factory.mktemp("export") / "artifact")


def test_every_phase(artifact: Artifact) -> None:
    """Decoding by the modules gives the engine's tokens, dense, cached and guided, alone and in shared steps."""
    weights = artifact.load_weights()
    ran = agree(artifact, {name: TorchStep(program, weights) for name, program in artifact.programs.items()})
    assert ran == set(artifact.programs)


def test_loops_run_at_once(tmp_path: Path) -> None:
    """A program that works in chunks becomes one without loops, and computes the same."""
    whole = compiled(tmp_path / "whole")
    chunked = compiled(tmp_path / "chunked", memory_budget=whole.memory["weights"] + whole.memory["total"] // 2)
    program = chunked.program
    assert not all(isinstance(item, Instruction) for item in program.instructions), "the budget asks for chunks"
    plain = without_loops(program)
    assert all(isinstance(item, Instruction) for item in plain.instructions)
    weights = chunked.load_weights()
    assert agree(chunked, {name: TorchStep(p, weights) for name, p in chunked.programs.items()})


def test_projections_in_parts(artifact: Artifact) -> None:
    """Queries, keys and values, gate and up are tensors of their own: no call writes into a part of a buffer."""
    program = in_parts(without_loops(artifact.programs["dense"]))
    for call, _ in program.calls():
        for view in call.outputs:
            assert element_count(view.shape) == element_count(program.tensor(view.base).shape)
    joint = [name for name in program.buffers if name.endswith("]")]
    assert {name.split("[")[1] for name in joint} >= {"0:40]", "40:80]", "80:120]", "0:72]", "72:144]"}


@given(data=st.data())
def test_views(data: st.DataObject) -> None:
    """A view reads and writes what `as_strided` does: slices, permutations, steps, single elements."""
    held = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    base = torch.arange(float(torch.Size(held).numel())).view(held)
    part = base
    for axis, dim in enumerate(held):
        start = data.draw(st.integers(0, dim - 1))
        length = data.draw(st.integers(1, dim - start))
        part = part.narrow(axis, start, length)
    part = part.permute(data.draw(st.permutations(range(len(held)))))
    shape, strides = (tuple(map(Affine, sizes)) for sizes in (part.shape, part.stride()))
    view = View("x", shape, strides, Affine(int(part.storage_offset())))
    dims = tuple(map(Affine, held))
    assert torch.equal(window(base, dims, view, {}), part)
    value = -1 - torch.rand(part.shape)
    expected = base.clone()
    expected.as_strided(part.shape, part.stride(), part.storage_offset()).copy_(value)
    assert torch.equal(written(base, dims, view, value, {}), expected)


def test_exported_program_has_dynamic_sizes(artifact: Artifact) -> None:
    """The exported graph, traced once, decodes at lengths that it was not traced with."""
    step = exported(artifact.programs["dense"], artifact.load_weights()).module()
    assert agree(artifact, {"dense": step}, DENSE_CASES) == {"dense"}

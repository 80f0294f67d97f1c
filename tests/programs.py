"""Small programs for tests: builders, random straight-line ones without a plan, and how the verifier judges them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from dllmc.errors import ProgramError
from dllmc.ir.program import (
    ALIGNMENT_BYTES,
    DTYPE_BYTES,
    SYMBOLS,
    Affine,
    DType,
    Instruction,
    Operand,
    Program,
    Shape,
    Tensor,
    View,
    aligned,
    dense_strides,
)
from dllmc.memory import planner
from dllmc.memory.liveness import lifetimes
from dllmc.memory.verifier import verify
from dllmc.runtime.arena import Memory
from dllmc.runtime.executor import Executor

MAXIMA = {"tokens": 9, "rows": 5, "guided": 3, "segments": 2, "active": 4}
TOKENS, ROWS, GUIDED = (Affine(0, ((symbol, 1),)) for symbol in ("tokens", "rows", "guided"))


def shape(*dims: int | Affine) -> Shape:
    """A shape of ints and affine sizes."""
    return tuple(dim if isinstance(dim, Affine) else Affine(dim) for dim in dims)


def tensor(*dims: int | Affine, dtype: str = "float32", offset: int | None = None) -> Tensor:
    """A tensor of that shape."""
    return Tensor(dtype, shape(*dims), offset)


def whole(name: str, described: Tensor) -> View:
    """The operand that is a whole tensor."""
    return View(name, described.shape, dense_strides(described.shape))


def program(
    buffers: Mapping[str, Tensor],
    instructions: Sequence[tuple[Sequence[str | Operand], Sequence[str | View]]],
    returns: Sequence[str] = (),
    inputs: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    arena_bytes: int | None = None,
) -> Program:
    """A program of `copy` instructions, each (operands, outputs); a name stands for the whole tensor of that name."""
    named = {**(inputs or {}), **(weights or {}), **buffers}

    def operand(given: str | Operand) -> Operand:
        return whole(given, named[given]) if isinstance(given, str) else given

    return Program(
        name="dense",
        maxima=MAXIMA,
        inputs=dict(inputs or {}),
        weights=dict(weights or {}),
        buffers=dict(buffers),
        instructions=tuple(
            Instruction("copy", tuple(map(operand, reads)), tuple(map(operand, writes)))  # type: ignore[arg-type]
            for reads, writes in instructions
        ),
        outputs={name: whole(name, named[name]) for name in returns},
        arena_bytes=arena_bytes,
    )


def executor_of(program: Program, weights: Mapping[str, torch.Tensor]) -> Executor:
    """The program over memory of its own."""
    return Executor(program, Memory([program], weights))


def planned(unplanned: Program) -> Program:
    """The program with the offsets that the planner finds for its lifetimes."""
    spans = lifetimes(unplanned)
    sizes = {name: aligned(unplanned.buffers[name].size_bytes(unplanned.maxima)) for name in spans}
    plan = planner.plan([planner.Buffer(name, *spans[name], size, ALIGNMENT_BYTES) for name, size in sizes.items()])
    buffers = {
        name: replace(unplanned.buffers[name], offset=plan.offsets[name], lifetime=span) for name, span in spans.items()
    }
    return replace(unplanned, buffers=buffers, arena_bytes=plan.height, lower_bound_bytes=plan.lower_bound)


def refusal(judged: Program) -> str | None:
    """Why the verifier refuses a program; None if it does not."""
    try:
        verify(judged)
    except ProgramError as error:
        return str(error)
    return None


def refuse(bad: Program, message: str) -> None:
    """The verifier refuses a program with a message that matches."""
    with pytest.raises(ProgramError, match=message):
        verify(bad)


affines = st.builds(
    lambda constant, symbol, coefficient: Affine(constant, ((symbol, coefficient),)),
    st.integers(0, 3),
    st.sampled_from(SYMBOLS),
    st.integers(1, 3),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of up to three dimensions, at most one of which grows with the step; some have no elements."""
    dims = draw(st.lists(st.integers(0, 6).map(Affine), max_size=2))
    dims = draw(st.permutations([*dims, draw(affines | st.integers(1, 40).map(Affine))]))
    return Tensor(draw(st.sampled_from(tuple(DTYPE_BYTES))), tuple(dims))


@st.composite
def views(draw: st.DrawFn, name: str, described: Tensor) -> View:
    """The whole tensor, maybe with its dimensions permuted, or one index of its first dimension."""
    dims, strides = described.shape, dense_strides(described.shape)
    if draw(st.booleans()) and dims[0].least(MAXIMA) > 0:
        index = draw(st.integers(0, dims[0].least(MAXIMA) - 1))
        return View(name, dims[1:], strides[1:], Affine(index * strides[0].constant, _times(strides[0].terms, index)))
    order = draw(st.permutations(range(len(dims))))
    return View(name, tuple(dims[axis] for axis in order), tuple(strides[axis] for axis in order))


def _times(terms: tuple[tuple[str, int], ...], factor: int) -> tuple[tuple[str, int], ...]:
    return tuple((symbol, coefficient * factor) for symbol, coefficient in terms if factor)


constants = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.sampled_from(tuple(DTYPE_BYTES)).map(DType),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Up to eight instructions, each of which reads views and constants and writes whole new or old buffers."""
    inputs = {f"in{i}": t for i, t in enumerate(draw(st.lists(tensors(), max_size=2)))}
    weights = {"w": Tensor("float32", shape(draw(st.integers(1, 20)), 2))}
    buffers: dict[str, Tensor] = {}
    instructions = []
    for index in range(draw(st.integers(1, 8))):
        readable = {**inputs, **weights, **{n: t for n, t in buffers.items() if "work" not in n}}
        read = draw(st.lists(st.sampled_from(sorted(readable)), max_size=3))
        operands = tuple(draw(views(name, readable[name])) for name in read)
        unread = sorted(name for name in buffers if name not in read and "work" not in name)
        written = draw(st.lists(st.sampled_from(unread), max_size=1)) if unread else []
        for output in range(draw(st.integers(0 if written else 1, 2))):
            written.append(f"%{index}.{output}")
            buffers[written[-1]] = draw(tensors())
        workspace = f"%{index}.work" if draw(st.booleans()) else None
        if workspace is not None:
            buffers[workspace] = Tensor("uint8", shape(draw(st.integers(0, 300))))
        # A list of views is one operand, as of `cat`.
        inside: Operand = operands if draw(st.booleans()) else (*operands[:1], draw(constants))
        outputs = tuple(whole(name, buffers[name]) for name in written)
        instructions.append(Instruction("op", (*operands, inside), outputs, workspace, draw(st.text(max_size=5))))
    outputs = st.lists(st.sampled_from(sorted(n for n in buffers if "work" not in n)), max_size=2, unique=True)
    returned = {f"out{i}": draw(views(name, buffers[name])) for i, name in enumerate(draw(outputs))}
    return Program("dense", MAXIMA, inputs, weights, buffers, tuple(instructions), returned)

"""Whether a program's calls are such as their operators take; programs come from files that anyone may have written.

Each call is tried at two sizes of a step on tensors without memory: operands of the kinds in the operator's schema, in
shapes that fit (`dllmc.ops.shapes`), results as planned, a workspace that suffices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ir.program import CHUNK, LEAST, START, Affine, DType, ForRows, Instruction, Operand, Program, Sizes, View
from dllmc.ops import elementwise, shapes
from dllmc.ops.registry import POINTWISE, operator

# The sizes of a small step, none of which is like another. Shapes that agree there and at the largest may still differ
# between: then a step fails when it is bound, in its own memory.
_SMALL = {"tokens": 29, "rows": 11, "guided": 3, "segments": 5, "active": 17, "pages": 13, CHUNK: 7}

# What torch calls the kind of a parameter -> whether a value is of it.
_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "Tensor": lambda value: isinstance(value, Tensor),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "number": lambda value: type(value) in (int, float, bool),
    "str": lambda value: isinstance(value, str),
    "ScalarType": lambda value: isinstance(value, torch.dtype),
}


def check(program: Program) -> None:
    """Raise `ProgramError` naming the first call that is not such as its operator takes."""
    small = {symbol: min(_SMALL[symbol], max(most - 1, LEAST[symbol])) for symbol, most in program.maxima.items()}
    for index, (instruction, loop) in enumerate(program.calls()):
        where = f"instruction {index} ({instruction.op})"
        for sizes in (small, program.maxima):
            _check(program, instruction, _within(sizes, loop), where)
        _check_workspace(program, instruction, _within(program.maxima, loop), where)


def _within(sizes: Sizes, loop: ForRows | None) -> Sizes:
    if loop is None:
        return sizes
    return {**sizes, START: 0, CHUNK: min(sizes[CHUNK], loop.extent.at(sizes))}


def _check(program: Program, instruction: Instruction, sizes: Sizes, where: str) -> None:
    try:
        given = _given(instruction.op, [_resolved(program, sizes, operand) for operand in instruction.inputs])
        shapes.check_operands(instruction.op, given)
        made = shapes.results(instruction.op, given)
    except (ValueError, IndexError, RuntimeError, TypeError) as error:  # the last two: sizes beyond torch's integers
        reason = str(error).partition("\n")[0]  # torch appends its own stack to some
        raise ProgramError(f"{where}: its operands do not fit the operator: {reason:.300}") from error
    planned = [[dim.at(sizes) for dim in view.shape] for view in instruction.outputs]
    if made != planned:
        raise ProgramError(f"{where}: its results have the shapes {made}, but it writes {planned}"[:400])


def _given(op: str, operands: Sequence[Any]) -> dict[str, Any]:
    """Operands by the names of the operator's parameters. Raises `ValueError` for one of another kind."""
    given: dict[str, Any] = {}
    parameters = _parameters(op)
    if len(operands) > len(parameters):
        raise ValueError(f"expected at most {len(parameters)} operands, found {len(operands)}")
    for number, (name, kind, required) in enumerate(parameters):
        if number < len(operands):
            number_too = kind == "Tensor" and op in POINTWISE  # as torch has it
            if not _is(operands[number], kind) and not (number_too and _is(operands[number], "number")):
                raise ValueError(f"operand {number}, {name}: expected a {kind}, found {operands[number]!r:.80}")
            given[name] = operands[number]
        elif required:
            raise ValueError(f"expected an operand {number}, {name}: {kind}")
    return given


def _parameters(op: str) -> list[tuple[str, str, bool]]:
    """Name, kind, and whether a program must give it, of each operand of an operator."""
    if op == "copy":
        return [("source", "Tensor", True)]
    namespace, packet, overload = op.split(".")
    schema = getattr(getattr(getattr(torch.ops, namespace), packet), overload)._schema
    options = elementwise.OPTIONS.get(op, ())
    return [
        (parameter.name, str(parameter.real_type), not parameter.has_default_value())
        for parameter in schema.arguments
        if not parameter.kwarg_only or parameter.name in options
    ]


def _is(value: Any, kind: str) -> bool:
    outer, _, inner = kind.rstrip("]").partition("[")
    if outer == "Optional":
        return value is None or _is(value, inner)
    if outer == "List":
        return isinstance(value, list) and all(_is(item, inner) for item in value)
    return _KINDS[kind](value)


def _check_workspace(program: Program, instruction: Instruction, sizes: Sizes, where: str) -> None:
    tensors = [_resolved(program, sizes, operand) for operand in instruction.inputs if isinstance(operand, View)]
    needed = operator(instruction.op).workspace_bytes(tensors, program.device)
    planned, dtype = 0, "uint8"
    if instruction.workspace is not None:
        workspace = program.tensor(instruction.workspace)
        planned, dtype = workspace.size_bytes(sizes), workspace.dtype
    if planned < needed or dtype != "uint8":
        raise ProgramError(
            f"{where}: expected a workspace of {needed} bytes (uint8) or more, found {planned} ({dtype})"
        )


def _resolved(program: Program, sizes: Sizes, operand: Operand) -> Any:
    """An operand as it is in a step of given sizes, views as tensors without memory."""
    if isinstance(operand, View):
        shape, strides = ([dim.at(sizes) for dim in dims] for dims in (operand.shape, operand.strides))
        dtype = getattr(torch, program.tensor(operand.base).dtype)
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    if isinstance(operand, Affine):
        return operand.at(sizes)
    if isinstance(operand, DType):
        return getattr(torch, operand.name)
    if isinstance(operand, tuple):
        return [_resolved(program, sizes, item) for item in operand]
    return operand

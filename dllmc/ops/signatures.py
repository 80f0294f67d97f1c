"""Whether a program's calls are such as their operators take; programs come from files that anyone may have written.

Operands are of the kinds in the operator's schema, in shapes that fit whatever the sizes of a step
(`dllmc.ops.shapes`), results as planned, and the largest step's workspace suffices.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dllmc.errors import ProgramError
from dllmc.ir.program import CHUNK, START, Affine, DType, Instruction, Operand, Program, Sizes, View
from dllmc.ir.program import Tensor as PlannedTensor
from dllmc.ops import elementwise, shapes
from dllmc.ops.registry import POINTWISE, operator

# What torch calls the kind of a parameter -> whether a value is of it.
_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "Tensor": lambda value: isinstance(value, shapes.Operand),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) in (int, Affine),
    "float": lambda value: type(value) in (int, Affine, float),
    "number": lambda value: type(value) in (int, Affine, float, bool),
    "str": lambda value: isinstance(value, str),
    "ScalarType": lambda value: isinstance(value, torch.dtype),
}


def check(program: Program) -> None:
    """Raise `ProgramError` naming the first call that is not such as its operator takes."""
    for index, (instruction, loop) in enumerate(program.calls()):
        where = f"instruction {index} ({instruction.op})"
        try:
            made = _results(program, instruction)
            sizes = program.maxima
            if loop is not None:
                sizes = {**sizes, START: 0, CHUNK: min(sizes[CHUNK], loop.extent.at(sizes))}
            needed = workspace_bytes(instruction, program.tensor, sizes, program.device)
        except (ValueError, IndexError, RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]  # torch appends its own stack to some
            raise ProgramError(f"{where}: its operands do not fit the operator: {reason:.300}") from error
        written = [[shapes.dim_of(dim) for dim in view.shape] for view in instruction.outputs]
        if made != written:
            found, planned = (", ".join(map(shapes.text, each)) for each in (made, written))
            raise ProgramError(f"{where}: its results have the shapes {found:.150}, but it writes {planned:.150}")
        _check_workspace(program, instruction, needed, where)


def operands(instruction: Instruction) -> Iterator[tuple[str, Operand]]:
    """A call's operands with the names that the operator's schema has for them."""
    yield from zip((name for name, _, _ in _parameters(instruction.op)), instruction.inputs, strict=False)


def workspace_bytes(instruction: Instruction, tensor: Callable[[str], PlannedTensor], sizes: Sizes, device: str) -> int:
    """Bytes of workspace that a call needs in a step of given sizes, on a device of that kind. tensor: by its name."""
    operands = []
    for view in (operand for operand in instruction.inputs if isinstance(operand, View)):
        shape, strides = ([dim.at(sizes) for dim in dims] for dims in (view.shape, view.strides))
        dtype = getattr(torch, tensor(view.base).dtype)
        operands.append(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
    return operator(instruction.op).workspace_bytes(operands, device)


def _results(program: Program, instruction: Instruction) -> list[shapes.Shape]:
    """The shapes of a call's results, in every step. Raises `ValueError`, `IndexError` or `TypeError`."""
    given = _given(instruction.op, [_seen(program, operand) for operand in instruction.inputs])
    shapes.check_operands(instruction.op, given)
    return shapes.results(instruction.op, given)


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


def _check_workspace(program: Program, instruction: Instruction, needed: int, where: str) -> None:
    planned, dtype = 0, "uint8"
    if instruction.workspace is not None:
        workspace = program.tensor(instruction.workspace)
        planned, dtype = math.prod(dim.least(program.maxima) for dim in workspace.shape), workspace.dtype
    if planned < needed or dtype != "uint8":
        raise ProgramError(
            f"{where}: expected a workspace of {needed} bytes (uint8) or more, found {planned} ({dtype})"
        )


def _seen(program: Program, operand: Operand) -> Any:
    """An operand as rules see it: sizes that grow with a step stay `Affine`."""
    if isinstance(operand, View):
        dtype = getattr(torch, program.tensor(operand.base).dtype)
        return shapes.Operand(dtype, tuple(shapes.dim_of(dim) for dim in operand.shape))
    if isinstance(operand, Affine):
        return shapes.dim_of(operand)
    if isinstance(operand, DType):
        return getattr(torch, operand.name)
    if isinstance(operand, tuple):
        return [_seen(program, item) for item in operand]
    return operand

"""Programs as JSON. What is read is checked field by field, so that a program in memory is always well-formed.

Whether its views and its plan are sound is for `dllmc.memory.verifier` to say, and its operators for the registry.
"""

import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from dllmc.errors import ProgramError
from dllmc.ir.program import (
    CHUNK,
    DEVICES,
    DTYPE_BYTES,
    PAGES,
    START,
    SYMBOLS,
    Affine,
    DType,
    ForRows,
    Instruction,
    Operand,
    Program,
    Shape,
    Tensor,
    View,
    dense_strides,
)

# No memory holds more bytes, and no shape more dimensions; products of so few numbers so small stay printable.
MAX_BITS = 48
MAX_DIMENSIONS = 64
GROUPS = ("inputs", "weights", "buffers", "caches")
_SIZES = (*SYMBOLS, PAGES, CHUNK, START)

T = TypeVar("T")
Tensors = Mapping[str, Tensor]
_KINDS: Mapping[type, str] = {dict: "a JSON object", list: "a JSON list", str: "text"}
_SHORT = reprlib.Repr()
_SHORT.maxlist, _SHORT.maxstring = 16, 80


def to_json(program: Program) -> dict[str, Any]:
    """A JSON document of the program; `from_json` reads it back equal."""
    return {
        "name": program.name,
        "maxima": program.maxima,
        "arena_bytes": program.arena_bytes,
        "lower_bound_bytes": program.lower_bound_bytes,
        **{group: {k: _tensor_json(t) for k, t in getattr(program, group).items()} for group in GROUPS},
        "instructions": [_item_json(program, item) for item in program.instructions],
        "outputs": {name: _operand_json(program, view) for name, view in program.outputs.items()},
        **({} if program.device == DEVICES[0] else {"device": program.device}),
    }


def from_json(data: Any, where: str) -> Program:
    """Parse and check a program; `where` names the file in errors. Raises `ProgramError` naming file and field."""
    try:
        return _program_from(data, where)
    except RecursionError:
        raise ProgramError(f"{where}: instructions: expected operands that are not nested so deeply") from None


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    plain: dict[str, Any] = {"dtype": tensor.dtype, "shape": _shape_json(tensor.shape)}
    if tensor.offset is not None:
        plain["offset"] = tensor.offset
    if tensor.lifetime is not None:
        plain["lifetime"] = list(tensor.lifetime)
    return plain


def _item_json(program: Program, item: Instruction | ForRows) -> dict[str, Any]:
    if isinstance(item, Instruction):
        return _instruction_json(program, item)
    return {"for_rows": _affine_json(item.extent), "body": [_instruction_json(program, i) for i in item.body]}


def _instruction_json(program: Program, instruction: Instruction) -> dict[str, Any]:
    lists = {name: [_operand_json(program, o) for o in getattr(instruction, name)] for name in ("inputs", "outputs")}
    return vars(instruction) | lists


def _operand_json(program: Program, operand: Operand) -> Any:
    if isinstance(operand, View):
        whole = program.tensor(operand.base).shape
        if operand == View(operand.base, whole, dense_strides(whole)):
            return {"view": operand.base}
        shape, strides = _shape_json(operand.shape), _shape_json(operand.strides)
        return {"view": operand.base, "shape": shape, "strides": strides, "offset": _affine_json(operand.offset)}
    if isinstance(operand, DType):
        return {"dtype": operand.name}
    if isinstance(operand, tuple):
        return [_operand_json(program, o) for o in operand]
    if isinstance(operand, Affine):
        return {"size": _affine_json(operand)}
    if isinstance(operand, float) and math.isinf(operand):
        return {"float": str(operand)}  # JSON has no spelling of it
    return operand


def _shape_json(shape: Shape) -> list[int | dict[str, int]]:
    return [_affine_json(dim) for dim in shape]


def _affine_json(affine: Affine) -> int | dict[str, int]:
    """An int when constant, else `{"tokens": 64, "constant": 3}`."""
    if not affine.terms:
        return affine.constant
    return dict(affine.terms) | ({"constant": affine.constant} if affine.constant else {})


def _program_from(data: Any, where: str) -> Program:
    document = _fields(data, where, {f.name for f in fields(Program)} - {"device"}, ("device",))
    device = document.get("device", DEVICES[0])
    _require(device in DEVICES, f"{where}: device", f"one of {', '.join(DEVICES)}", device)
    instructions = _typed(document["instructions"], list, f"{where}: instructions")
    loops = any(isinstance(item, dict) and "for_rows" in item for item in instructions)
    sizes = (*SYMBOLS, *([CHUNK] if loops else ()), *([PAGES] if document["caches"] else ()))
    maxima = _fields(document["maxima"], f"{where}: maxima", set(sizes))
    groups = {
        group: {
            name: _tensor_from(entry, group == "buffers", f"{where}: {group}.{name}")
            for name, entry in _typed(document[group], dict, f"{where}: {group}").items()
        }
        for group in GROUPS
    }
    tensors: dict[str, Tensor] = {}
    for group, entries in groups.items():
        for name in entries:
            _require(name not in tensors, f"{where}: {group}", "names that no other tensor has", name)
        tensors |= entries
    outputs = _typed(document["outputs"], dict, f"{where}: outputs")
    return Program(
        name=_typed(document["name"], str, f"{where}: name"),
        maxima={symbol: _count(maxima[symbol], f"{where}: maxima.{symbol}", least=1) for symbol in sizes},
        inputs=groups["inputs"],
        weights=groups["weights"],
        buffers=groups["buffers"],
        caches=groups["caches"],
        instructions=tuple(
            _item_from(entry, groups["buffers"], tensors, f"{where}: instructions[{number}]")
            for number, entry in enumerate(instructions)
        ),
        outputs={name: _view_from(view, tensors, f"{where}: outputs.{name}") for name, view in outputs.items()},
        arena_bytes=_optional_count(document["arena_bytes"], f"{where}: arena_bytes"),
        lower_bound_bytes=_optional_count(document["lower_bound_bytes"], f"{where}: lower_bound_bytes"),
        device=device,
    )


def _tensor_from(data: Any, is_buffer: bool, where: str) -> Tensor:
    entry = _fields(data, where, {"dtype", "shape"}, ("offset", "lifetime") if is_buffer else ())
    dtype, shape = _dtype(entry["dtype"], f"{where}.dtype"), _shape_from(entry["shape"], f"{where}.shape")
    try:
        dense_strides(shape)
    except ProgramError as error:
        raise ProgramError(f"{where}.shape: {error}") from None
    offset = _optional_count(entry.get("offset"), f"{where}.offset")
    if "lifetime" not in entry:
        return Tensor(dtype, shape, offset)
    ends = [_count(n, f"{where}.lifetime") for n in _typed(entry["lifetime"], list, f"{where}.lifetime")]
    _require(len(ends) == 2 and ends == sorted(ends), f"{where}.lifetime", "two instruction numbers in order", ends)
    return Tensor(dtype, shape, offset, (ends[0], ends[1]))


def _item_from(data: Any, buffers: Tensors, tensors: Tensors, where: str) -> Instruction | ForRows:
    if "for_rows" not in _typed(data, dict, where):
        return _instruction_from(data, buffers, tensors, where)
    entry = _fields(data, where, {"for_rows", "body"})
    extent = _affine_from(entry["for_rows"], f"{where}.for_rows")
    ok = bool(extent.terms) and dict(extent.terms).keys() <= set(SYMBOLS)
    _require(ok, f"{where}.for_rows", f"a size in {', '.join(SYMBOLS)}", entry["for_rows"])
    body = _typed(entry["body"], list, f"{where}.body")
    return ForRows(
        extent, tuple(_instruction_from(i, buffers, tensors, f"{where}.body[{n}]") for n, i in enumerate(body))
    )


def _instruction_from(data: Any, buffers: Tensors, tensors: Tensors, where: str) -> Instruction:
    entry = _fields(data, where, {f.name for f in fields(Instruction)})
    inputs, outputs = (_typed(entry[name], list, f"{where}.{name}") for name in ("inputs", "outputs"))
    workspace = entry["workspace"]
    ok = workspace is None or (isinstance(workspace, str) and workspace in buffers)
    _require(ok, f"{where}.workspace", "the name of a buffer", workspace)
    return Instruction(
        op=_typed(entry["op"], str, f"{where}.op"),
        inputs=tuple(_operand_from(o, tensors, f"{where}.inputs[{n}]") for n, o in enumerate(inputs)),
        outputs=tuple(_view_from(o, tensors, f"{where}.outputs[{n}]") for n, o in enumerate(outputs)),
        workspace=workspace,
        source=_typed(entry["source"], str, f"{where}.source"),
    )


def _operand_from(data: Any, tensors: Tensors, where: str) -> Operand:
    if isinstance(data, list):
        return tuple(_operand_from(item, tensors, f"{where}[{number}]") for number, item in enumerate(data))
    if isinstance(data, dict):
        if set(data) == {"dtype"}:
            return DType(_dtype(data["dtype"], f"{where}.dtype"))
        if set(data) == {"float"}:
            _require(data["float"] in ("inf", "-inf"), f"{where}.float", "'inf' or '-inf'", data["float"])
            return float(data["float"])
        if set(data) == {"size"}:
            return _affine_from(data["size"], f"{where}.size")
        return _view_from(data, tensors, where)
    if isinstance(data, int) and not isinstance(data, bool):
        _require(-(2**63) <= data < 2**63, where, "an integer of 64 bits", data)
    elif isinstance(data, float):
        _require(math.isfinite(data), where, "a finite number", data)
    else:
        _require(data is None or isinstance(data, bool | str), where, "a constant or a view", data)
    constant: Operand = data
    return constant


def _view_from(data: Any, tensors: Tensors, where: str) -> View:
    entry = _typed(data, dict, where)
    entry = _fields(entry, where, {"view"} if len(entry) == 1 else {"view", "shape", "strides", "offset"})
    base = _typed(entry["view"], str, f"{where}.view")
    _require(base in tensors, f"{where}.view", "the name of an input, a weight, a buffer or a cache", base)
    if len(entry) == 1:
        shape = tensors[base].shape
        return View(base, shape, dense_strides(shape))
    shape, strides = (_shape_from(entry[axes], f"{where}.{axes}") for axes in ("shape", "strides"))
    _require(len(strides) == len(shape), f"{where}.strides", f"{len(shape)}, one a dimension", len(strides))
    return View(base, shape, strides, _affine_from(entry["offset"], f"{where}.offset"))


def _shape_from(data: Any, where: str) -> Shape:
    dims = _typed(data, list, where)
    _require(len(dims) <= MAX_DIMENSIONS, where, f"at most {MAX_DIMENSIONS} dimensions", len(dims))
    return tuple(_affine_from(dim, f"{where}[{axis}]") for axis, dim in enumerate(dims))


def _affine_from(data: Any, where: str) -> Affine:
    if not isinstance(data, dict):
        return Affine(_integer(data, where))
    entry = _fields(data, where, set(), (*_SIZES, "constant"))
    values = {name: _integer(value, f"{where}.{name}") for name, value in entry.items()}
    terms = tuple((symbol, values[symbol]) for symbol in sorted(_SIZES) if values.get(symbol))
    return Affine(values.get("constant", 0), terms)


def _dtype(value: Any, where: str) -> str:
    name = _typed(value, str, where)
    _require(name in DTYPE_BYTES, where, f"one of {', '.join(DTYPE_BYTES)}", name)
    return name


def _optional_count(value: Any, where: str) -> int | None:
    return None if value is None else _count(value, where)


def _count(value: Any, where: str, least: int = 0) -> int:
    number = _integer(value, where)
    _require(number >= least, where, f"{least} or more", number)
    return number


def _integer(value: Any, where: str) -> int:
    ok = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << MAX_BITS
    _require(ok, where, f"an integer below 2**{MAX_BITS}", value)
    return int(value)


def _typed(data: Any, kind: type[T], where: str) -> T:
    _require(isinstance(data, kind), where, _KINDS[kind], data)
    found: T = data
    return found


def _fields(data: Any, where: str, names: set[str], optional: Collection[str] = ()) -> dict[str, Any]:
    entry = _typed(data, dict, where)
    ok = names <= entry.keys() <= names.union(optional)
    _require(ok, where, f"the fields {', '.join(sorted(names.union(optional)))}", list(entry))
    return entry


def _require(ok: bool, where: str, expected: str, found: object) -> None:
    if not ok:
        raise ProgramError(f"{where}: expected {expected}, found {_SHORT.repr(found)}")

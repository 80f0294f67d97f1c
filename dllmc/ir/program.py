"""The lowered form of a step: instructions over views of buffers, weights and inputs. Plain data, JSON in and out.

Shapes are affine in the step's sizes (`SYMBOLS`), so one program serves every batch. Views are operands, not
instructions. A program names operators, never code: `dllmc.ops.registry` is the allow-list.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dllmc.errors import ProgramError

SYMBOLS = ("tokens", "rows", "guided", "segments")
"""The sizes of a step: packed tokens, rows of the head, rows of those that are guided, segments of tokens."""

Sizes = Mapping[str, int]
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Affine:
    """`constant + sum(coefficient * symbol)`, terms sorted by symbol, no zero coefficients."""

    constant: int = 0
    terms: tuple[tuple[str, int], ...] = ()

    def at(self, sizes: Sizes) -> int:
        """The value for given sizes."""
        return self.constant + sum(coefficient * sizes[symbol] for symbol, coefficient in self.terms)

    def to_json(self) -> int | dict[str, int]:
        """An int when constant, else `{"tokens": 64, "constant": 3}`."""
        if not self.terms:
            return self.constant
        return dict(self.terms) | ({"constant": self.constant} if self.constant else {})

    @classmethod
    def from_json(cls, data: Any, where: str) -> "Affine":
        """Parse and check what `to_json` writes. Raises `ProgramError`."""
        items = data.items() if isinstance(data, dict) else [("constant", data)]
        values = dict(items)
        for name, value in values.items():
            if name not in (*SYMBOLS, "constant") or not isinstance(value, int) or isinstance(value, bool):
                raise ProgramError(f"{where}: expected an integer or coefficients of {SYMBOLS}, found {data!r}")
        terms = tuple((s, values[s]) for s in sorted(SYMBOLS) if values.get(s))
        return cls(values.get("constant", 0), terms)

    def __str__(self) -> str:
        parts = [s if c == 1 else f"{c}*{s}" for s, c in self.terms]
        return " + ".join(parts + ([str(self.constant)] if self.constant or not parts else []))


Shape = tuple[Affine, ...]


@dataclass(frozen=True)
class Tensor:
    """A named piece of memory: an input, a weight or a buffer. Dense and row-major; `offset` in arena bytes.

    `lifetime` is half-open in instructions: written at its first, last read before its second. Buffers only.
    """

    dtype: str
    shape: Shape
    offset: int | None = None
    lifetime: tuple[int, int] | None = None

    def size_bytes(self, sizes: Sizes) -> int:
        """Bytes of the whole tensor for given sizes."""
        count = 1
        for dim in self.shape:
            count *= dim.at(sizes)
        return count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class View:
    """An operand: a strided window on a tensor. Shape, strides and offset count elements of the tensor's dtype."""

    base: str
    shape: Shape
    strides: Shape
    offset: Affine = Affine()


@dataclass(frozen=True)
class DType:
    """A dtype as a constant operand."""

    name: str


Operand = View | DType | bool | int | float | str | None | tuple["Operand", ...]


@dataclass(frozen=True)
class Instruction:
    """One operator call: positional operands in, views written. `source` is the user's line it came from."""

    op: str
    inputs: tuple[Operand, ...]
    outputs: tuple[View, ...]
    workspace: str | None = None
    source: str = ""

    def reads(self) -> Iterator[View]:
        """Every view among the operands, those inside lists too."""
        yield from _views(self.inputs)


@dataclass(frozen=True)
class Program:
    """A phase's step. `maxima` are the sizes that offsets were planned for; a step may be smaller, never larger."""

    name: str
    maxima: dict[str, int]
    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    instructions: tuple[Instruction, ...]
    outputs: dict[str, View]
    arena_bytes: int | None = None
    lower_bound_bytes: int | None = field(default=None)

    @property
    def state_bytes(self) -> int:
        """Bytes of all inputs at their largest."""
        return sum(aligned(t.size_bytes(self.maxima)) for t in self.inputs.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and constants."""
        return sum(t.size_bytes(self.maxima) for t in self.weights.values())

    def tensor(self, base: str) -> Tensor:
        """The input, weight or buffer of that name."""
        for group in (self.buffers, self.weights, self.inputs):
            if base in group:
                return group[base]
        raise ProgramError(f"program {self.name!r}: no input, weight or buffer is named {base!r}")


def aligned(size_bytes: int) -> int:
    """Round up to the arena's alignment."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def dense_strides(shape: Sequence[Affine]) -> Shape:
    """Row-major strides. At most one dimension right of any other may be symbolic; else `ProgramError`."""
    strides = [Affine(1)]
    for dim in reversed(shape[1:]):
        strides.append(product(dim, strides[-1]))
    return tuple(reversed(strides)) if shape else ()


def product(a: Affine, b: Affine) -> Affine:
    """The product, where one factor is constant; a product of two sizes is not affine (`ProgramError`)."""
    if a.terms and b.terms:
        raise ProgramError(f"({a}) * ({b}) grows with the product of two sizes of a step, which no plan can bound")
    if a.terms:
        a, b = b, a
    if a.constant == 0:
        return Affine()
    return Affine(a.constant * b.constant, tuple((s, a.constant * c) for s, c in b.terms))


def _views(operands: Sequence[Operand]) -> Iterator[View]:
    for operand in operands:
        if isinstance(operand, View):
            yield operand
        elif isinstance(operand, tuple):
            yield from _views(operand)


def to_json(program: Program) -> dict[str, Any]:
    """A JSON document of the program; `from_json` reads it back equal."""
    return {
        "name": program.name,
        "maxima": program.maxima,
        "arena_bytes": program.arena_bytes,
        "lower_bound_bytes": program.lower_bound_bytes,
        **{group: {k: _tensor_json(t) for k, t in getattr(program, group).items()} for group in _GROUPS},
        "instructions": [
            {
                "op": i.op,
                "inputs": [_operand_json(program, o) for o in i.inputs],
                "outputs": [_operand_json(program, o) for o in i.outputs],
                "workspace": i.workspace,
                "source": i.source,
            }
            for i in program.instructions
        ],
        "outputs": {name: _operand_json(program, view) for name, view in program.outputs.items()},
    }


def from_json(data: Any, where: str) -> Program:
    """Parse and check a program's structure; `where` names the file in errors. Raises `ProgramError`."""
    document = _fields(data, {f.name for f in fields(Program)}, where)
    maxima = _fields(document["maxima"], set(SYMBOLS), f"{where}: maxima")
    for symbol, value in maxima.items():
        _require(_is_count(value), f"{where}: maxima.{symbol}", "a positive integer below 2**31", value)
    groups: dict[str, dict[str, Tensor]] = {}
    for group in _GROUPS:
        entries = _mapping(document[group], f"{where}: {group}")
        groups[group] = {k: _tensor_from(t, f"{where}: {group}.{k}") for k, t in entries.items()}
    names = [name for group in groups.values() for name in group]
    _require(len(names) == len(set(names)), where, "a name for one tensor only", "a name used twice")
    tensors = {name: tensor for group in groups.values() for name, tensor in group.items()}
    instructions = []
    for number, entry in enumerate(_list(document["instructions"], f"{where}: instructions")):
        at = f"{where}: instructions[{number}]"
        item = _fields(entry, {f.name for f in fields(Instruction)}, at)
        for name in ("op", "source"):
            _require(isinstance(item[name], str), f"{at}.{name}", "text", item[name])
        inputs = tuple(_operand_from(o, tensors, f"{at}.inputs") for o in _list(item["inputs"], at))
        outputs = tuple(_view_from(o, tensors, f"{at}.outputs") for o in _list(item["outputs"], at))
        workspace = item["workspace"]
        _require(workspace is None or workspace in groups["buffers"], f"{at}.workspace", "a buffer", workspace)
        instructions.append(Instruction(item["op"], inputs, outputs, workspace, item["source"]))
    for name in ("arena_bytes", "lower_bound_bytes"):
        value = document[name]
        ok = value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48)
        _require(ok, f"{where}: {name}", "a size in bytes below 2**48", value)
    outputs_of = _mapping(document["outputs"], f"{where}: outputs")
    return Program(
        name=str(document["name"]),
        maxima={s: maxima[s] for s in SYMBOLS},
        instructions=tuple(instructions),
        outputs={k: _view_from(v, tensors, f"{where}: outputs.{k}") for k, v in outputs_of.items()},
        arena_bytes=document["arena_bytes"],
        lower_bound_bytes=document["lower_bound_bytes"],
        inputs=groups["inputs"],
        weights=groups["weights"],
        buffers=groups["buffers"],
    )


_GROUPS = ("inputs", "weights", "buffers")


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    plain: dict[str, Any] = {"dtype": tensor.dtype, "shape": [d.to_json() for d in tensor.shape]}
    if tensor.offset is not None:
        plain["offset"] = tensor.offset
    if tensor.lifetime is not None:
        plain["lifetime"] = list(tensor.lifetime)
    return plain


def _operand_json(program: Program, operand: Operand) -> Any:
    if isinstance(operand, View):
        whole = program.tensor(operand.base).shape
        if operand == View(operand.base, whole, dense_strides(whole)):
            return {"view": operand.base}
        axes = {"shape": operand.shape, "strides": operand.strides}
        listed = {k: [d.to_json() for d in v] for k, v in axes.items()}
        return {"view": operand.base, **listed, "offset": operand.offset.to_json()}
    if isinstance(operand, DType):
        return {"dtype": operand.name}
    if isinstance(operand, tuple):
        return [_operand_json(program, o) for o in operand]
    return operand


def _tensor_from(data: Any, where: str) -> Tensor:
    entry = _mapping(data, where)
    _require(set(entry) <= {f.name for f in fields(Tensor)}, where, "dtype, shape, offset, lifetime", sorted(entry))
    dtype = entry.get("dtype")
    _require(isinstance(dtype, str) and dtype in DTYPE_BYTES, f"{where}.dtype", f"one of {sorted(DTYPE_BYTES)}", dtype)
    shape = tuple(Affine.from_json(d, f"{where}.shape") for d in _list(entry.get("shape"), f"{where}.shape"))
    offset = entry.get("offset")
    ok = offset is None or (isinstance(offset, int) and not isinstance(offset, bool) and 0 <= offset < 2**48)
    _require(ok, f"{where}.offset", "a byte offset below 2**48", offset)
    lifetime = entry.get("lifetime")
    if lifetime is not None:
        ok = isinstance(lifetime, list) and len(lifetime) == 2 and all(isinstance(n, int) and n >= 0 for n in lifetime)
        _require(ok, f"{where}.lifetime", "two instruction numbers", lifetime)
        lifetime = (lifetime[0], lifetime[1])
    return Tensor(str(dtype), shape, offset, lifetime)


def _operand_from(data: Any, tensors: Mapping[str, Tensor], where: str) -> Operand:
    if isinstance(data, list):
        return tuple(_operand_from(item, tensors, where) for item in data)
    if isinstance(data, dict):
        if set(data) == {"dtype"}:
            _require(data["dtype"] in DTYPE_BYTES, where, f"a dtype of {sorted(DTYPE_BYTES)}", data["dtype"])
            return DType(data["dtype"])
        return _view_from(data, tensors, where)
    _require(data is None or isinstance(data, bool | int | float | str), where, "a constant or a view", data)
    constant: Operand = data
    return constant


def _view_from(data: Any, tensors: Mapping[str, Tensor], where: str) -> View:
    entry = _mapping(data, where)
    base = entry.get("view")
    _require(isinstance(base, str) and base in tensors, f"{where}.view", "the name of a tensor", base)
    if set(entry) == {"view"}:
        shape = tensors[str(base)].shape
        return View(str(base), shape, dense_strides(shape))
    _require(set(entry) == {"view", "shape", "strides", "offset"}, where, "view, shape, strides, offset", sorted(entry))
    shape, strides = (
        tuple(Affine.from_json(d, f"{where}.{axis}") for d in _list(entry[axis], f"{where}.{axis}"))
        for axis in ("shape", "strides")
    )
    _require(len(shape) == len(strides), where, "as many strides as dimensions", f"{len(shape)} and {len(strides)}")
    return View(str(base), shape, strides, Affine.from_json(entry["offset"], f"{where}.offset"))


def _require(ok: bool, where: str, expected: str, found: object) -> None:
    if not ok:
        raise ProgramError(f"{where}: expected {expected}, found {found!r}")


def _mapping(data: Any, where: str) -> dict[str, Any]:
    _require(isinstance(data, dict), where, "a JSON object", data)
    return dict(data)


def _list(data: Any, where: str) -> list[Any]:
    _require(isinstance(data, list), where, "a JSON list", data)
    return list(data)


def _fields(data: Any, names: set[str], where: str) -> dict[str, Any]:
    entry = _mapping(data, where)
    _require(set(entry) == names, where, f"the fields {sorted(names)}", sorted(entry))
    return entry


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31

"""The lowered form of a step: instructions over views of buffers, weights and inputs. Plain data.

Shapes are affine in the step's sizes (`SYMBOLS`), so one program serves every batch. Views are operands, not
instructions. A program names operators, never code: `dllmc.ops.registry` is the allow-list.
`dllmc.ir.program_json` writes and reads programs as JSON.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod

from dllmc.errors import ProgramError
from dllmc.ir import places

SYMBOLS = ("tokens", "rows", "guided", "segments", "active")
"""The sizes of a step: packed tokens, rows of the head, rows of those that are guided, segments of tokens, and tokens
of the active spans of the segments that a Refresh caches."""

PAGES = "pages"
"""The size of an engine, the same in all of its steps: pages of the KV pool."""

CHUNK, START = "chunk", "start"
"""Sizes within a `ForRows`: the rows of an iteration, and those before it."""

LEAST = {"tokens": 1, "rows": 1, "guided": 0, "segments": 1, "active": 0, PAGES: 1, CHUNK: 1, START: 0}
"""The smallest sizes that a step, an engine, or an iteration can have."""

DEVICES = ("cpu", "cuda")
"""What a program's workspaces may be planned for. What is planned for cuda suffices on a CPU too."""

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
        if not self.terms:
            return self.constant
        return self.constant + sum(coefficient * sizes[symbol] for symbol, coefficient in self.terms)

    def least(self, maxima: Sizes) -> int:
        """The smallest value for any sizes from `LEAST` to `maxima`."""
        ends = (coefficient * (LEAST if coefficient > 0 else maxima)[symbol] for symbol, coefficient in self.terms)
        return self.constant + sum(ends)

    def of(self, symbol: str) -> int:
        """The coefficient of a symbol."""
        return dict(self.terms).get(symbol, 0)

    def __add__(self, other: "Affine") -> "Affine":
        terms = dict(self.terms)
        for symbol, coefficient in other.terms:
            terms[symbol] = terms.get(symbol, 0) + coefficient
        return Affine(self.constant + other.constant, tuple(sorted((s, c) for s, c in terms.items() if c)))

    def __sub__(self, other: "Affine") -> "Affine":
        return self + product(Affine(-1), other)

    def __str__(self) -> str:
        parts = [s if c == 1 else f"{c}*{s}" for s, c in self.terms]
        text = " + ".join(parts + ([str(self.constant)] if self.constant or not parts else []))
        return text.replace("+ -", "- ")


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


Operand = View | DType | Affine | bool | int | float | str | None | tuple["Operand", ...]


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
class ForRows:
    """Instructions that run for `chunk` rows of `extent`, then for the next ones; the last time for what is left.

    Within, `chunk` is the number of rows and `start` that of those before them. A buffer whose shape has `chunk` in it
    belongs to one `ForRows` and keeps nothing from one iteration to the next.
    """

    extent: Affine
    body: tuple[Instruction, ...]


@dataclass(frozen=True)
class Program:
    """A phase's step. `maxima` are the sizes that offsets were planned for; a step may be smaller, never larger.

    `chunk` is among them where there is a `ForRows`: the rows of an iteration; and `pages` where there are caches: what
    an engine's pool has. `caches` keep their contents from step to step. `device` is one of `DEVICES`.
    """

    name: str
    maxima: dict[str, int]
    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    instructions: tuple[Instruction | ForRows, ...]
    outputs: dict[str, View]
    arena_bytes: int | None = None
    lower_bound_bytes: int | None = None
    caches: dict[str, Tensor] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def input_bytes(self) -> int:
        """Bytes of all inputs at their largest."""
        return sum(aligned(t.size_bytes(self.maxima)) for t in self.inputs.values())

    @property
    def place_bytes(self) -> int:
        """Bytes of what a GPU knows of the requests of a step (`dllmc.ir.places`); 0 on a CPU, where the host knows."""
        if self.device == "cpu":
            return 0
        tensors = places.shapes(self.maxima).values()
        return sum(aligned(DTYPE_BYTES[dtype] * prod(shape)) for dtype, shape in tensors)

    @property
    def state_bytes(self) -> int:
        """Bytes that hold what a step is told."""
        return self.place_bytes + self.input_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and constants."""
        return sum(t.size_bytes(self.maxima) for t in self.weights.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV pool: of its pages in all caches."""
        return sum(aligned(t.size_bytes(self.maxima)) for t in self.caches.values())

    @property
    def page_tokens(self) -> int:
        """Slots of a page, the same in all caches [2, kv_heads, pages, page_tokens, head_dim]; 0 without caches."""
        return next((cache.shape[3].constant for cache in self.caches.values()), 0)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all caches together."""
        return sum(aligned(cache.size_bytes({PAGES: 1})) for cache in self.caches.values())

    def calls(self) -> Iterator[tuple[Instruction, ForRows | None]]:
        """Every instruction once, in order, and the `ForRows` that it is in; lifetimes count these."""
        for item in self.instructions:
            if isinstance(item, ForRows):
                yield from ((instruction, item) for instruction in item.body)
            else:
                yield item, None

    def iterations(self, loop: ForRows, sizes: Sizes) -> Iterator[Sizes]:
        """The sizes of each iteration of a loop in a step of given sizes."""
        extent = loop.extent.at(sizes)
        for start in range(0, extent, self.maxima[CHUNK]):
            yield {**sizes, START: start, CHUNK: min(self.maxima[CHUNK], extent - start)}

    def is_chunk(self, base: str) -> bool:
        """Whether a buffer holds the rows of one iteration."""
        return base in self.buffers and any(dim.of(CHUNK) for dim in self.buffers[base].shape)

    def tensor(self, base: str) -> Tensor:
        """The input, weight, buffer or cache of that name."""
        for group in (self.buffers, self.weights, self.inputs, self.caches):
            if base in group:
                return group[base]
        raise ProgramError(f"program {self.name!r}: no input, weight, buffer or cache is named {base!r}")


def aligned(size_bytes: int) -> int:
    """Round up to the arena's alignment."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def dense_strides(shape: Sequence[Affine]) -> Shape:
    """Row-major strides. At most one dimension right of any other may be symbolic; else `ProgramError`."""
    strides = [Affine(1)]
    for dim in reversed(shape[1:]):
        strides.append(product(dim, strides[-1]))
    return tuple(reversed(strides)) if shape else ()


def element_count(shape: Sequence[Affine]) -> Affine:
    """How many elements a tensor of that shape has; `ProgramError` where that is not affine."""
    return reduce(product, shape, Affine(1))


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

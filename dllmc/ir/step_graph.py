"""One denoising step as a functional fx graph, plus what fx does not know: the role of each placeholder.

`symbols` names the graph's symbolic sizes in the program's words (`tokens`, `rows`, `guided`, `segments`).
Passes rewrite `graph`; the pipeline then calls `propagate`, which brings `meta["val"]` up to date.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import sympy
import torch
from torch import SymInt, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from dllmc.errors import CaptureError
from dllmc.ir.program import PAGES, SYMBOLS, Affine, Program
from dllmc.ir.provenance import describe
from dllmc.spec import ModelSpec

# Sizes that fake propagation may assume for a symbol; distinct, so that no two are ever taken for one.
HINTS = dict(zip((*SYMBOLS, PAGES), (23, 11, 7, 5, 17, 19), strict=True))

# What a node's place is taken from: what export notes of where it came from, and the loop that it is in.
_ORIGIN = ("stack_trace", "nn_module_stack", "loop")


@dataclass(frozen=True)
class Loop:
    """Neighbouring calls that run for some rows of `extent` after others: `meta["loop"]` of each."""

    index: int
    extent: Affine


def loop_of(node: fx.Node) -> Loop | None:
    """The loop that a call is in."""
    return node.meta.get("loop")


@dataclass(frozen=True)
class Role:
    """What a placeholder is, and its name: a weight's in the model, any other's in the program."""

    kind: Literal["input", "weight", "constant", "cache"]
    name: str


class Tensors(dict[str, torch.Tensor]):
    """Weights and constants by name. A joined weight is made anew whenever it is asked for, so none is kept twice."""

    def __init__(self, tensors: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
        super().__init__(tensors)
        self._parts: dict[str, tuple[str, ...]] = {}

    def join(self, name: str, parts: Sequence[str]) -> None:
        """Name the concatenation of tensors along their first axis."""
        self._parts[name] = tuple(parts)

    def sources(self, name: str) -> tuple[str, ...]:
        """The tensors whose concatenation that one is: itself, if it was not joined."""
        if name not in self._parts:
            return (name,)
        return tuple(source for part in self._parts[name] for source in self.sources(part))

    def names(self) -> tuple[str, ...]:
        """All that there are, joined ones too."""
        return (*self, *self._parts)

    def __missing__(self, name: str) -> torch.Tensor:
        return torch.cat([self[part] for part in self._parts[name]])


@dataclass
class StepGraph:
    """A step on its way through the passes. `lower` sets `program`, `plan-memory` its offsets.

    `tensors`: weights and constants by name; weights may lie on the meta device. `maxima`: the largest sizes of a
    step. `outputs` names what the graph returns, in order. `phases` are the parts of the program for steps that need
    no more, by name.
    """

    module: fx.GraphModule
    spec: ModelSpec
    maxima: dict[str, int]
    fake_mode: FakeTensorMode
    roles: dict[str, Role]
    tensors: Tensors
    symbols: dict[sympy.Symbol, str]
    outputs: tuple[str, ...] = ("logits",)
    program: Program | None = None
    phases: dict[str, Program] = field(default_factory=dict)
    _sizes: dict[str, SymInt] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The fx graph that passes rewrite."""
        return self.module.graph

    def calls(self, *targets: object) -> Iterator[fx.Node]:
        """The calls of any of the given operators, in order; every call when none is given."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and (not targets or node.target in targets):
                yield node

    def placeholders(self) -> Iterator[tuple[fx.Node, Role]]:
        """Every placeholder with its role, in order."""
        for node in self.graph.find_nodes(op="placeholder"):
            yield node, self.roles[node.name]

    def input(self, name: str) -> fx.Node | None:
        """The placeholder of the step's input of that name, if the graph has it."""
        return next((n for n, role in self.placeholders() if role == Role("input", name)), None)

    def output_nodes(self) -> tuple[fx.Node, ...]:
        """What the step returns, in the order of `outputs`."""
        return tuple(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def set_outputs(self, **outputs: fx.Node) -> None:
        """Make the step return these values."""
        self.graph.output_node().args = (tuple(outputs.values()),)
        self.outputs = tuple(outputs)

    def call(self, target: Any, *args: Any, origin: fx.Node) -> fx.Node:
        """A new call where the graph is being edited, traced back to what `origin` came from in the user's model."""
        name = getattr(target, "__name__", "call").partition(".")[0]
        node = self.graph.create_node("call_function", target, args, name=name)
        node.meta = {key: origin.meta[key] for key in _ORIGIN if key in origin.meta}
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let all that reads `old` read `new`, and erase what then serves nothing; every operator is pure."""
        old.replace_all_uses_with(new)
        unused = {old: None}
        while unused:
            node, _ = unused.popitem()
            if not node.users and node.op == "call_function":
                inputs = node.all_input_nodes
                self.graph.erase_node(node)
                unused |= dict.fromkeys(inputs)

    def size(self, symbol: str) -> SymInt:
        """The symbolic size of that name; made on first use."""
        if symbol not in self._sizes:
            env = self.shape_env
            source, dynamic = ConstantSource(symbol), DimDynamic.DYNAMIC
            made = env.create_symbol(HINTS[symbol], source=source, dynamic_dim=dynamic, do_not_specialize_zero_one=True)
            assert isinstance(made, sympy.Symbol)
            self.symbols[made] = symbol
            size = env.create_symintnode(made, hint=HINTS[symbol], source=None)
            assert isinstance(size, SymInt)
            self._sizes[symbol] = size
        return self._sizes[symbol]

    @property
    def shape_env(self) -> ShapeEnv:
        """Where the graph's symbolic sizes live."""
        env = self.fake_mode.shape_env
        assert env is not None
        return env

    def add_input(self, name: str, shape: Sequence[int | SymInt], dtype: torch.dtype) -> fx.Node:
        """A new input of the step; an input of that name that exists already is returned as it is."""
        if (found := self.input(name)) is not None:
            return found
        with self.fake_mode:
            value = torch.empty(tuple(shape), dtype=dtype)
        return self._add_placeholder(Role("input", name), value)

    def add_cache(self, heads: int, head_dim: int, page_tokens: int, dtype: torch.dtype) -> fx.Node:
        """A new cache of keys and values, [2, heads, pages, page_tokens, head_dim], kept from step to step."""
        name = f"cache.{sum(role.kind == 'cache' for role in self.roles.values())}"
        pages = self.size(PAGES)
        with self.fake_mode:
            value = torch.empty(2, heads, pages, page_tokens, head_dim, dtype=dtype)
        return self._add_placeholder(Role("cache", name), value)

    def join_weights(self, weights: Sequence[fx.Node]) -> fx.Node:
        """A new weight: those of the given placeholders one after the other along their first axis."""
        names = [self.roles[node.name].name for node in weights]
        self.tensors.join(joined := "+".join(names), names)
        with self.fake_mode:
            value = torch.cat([node.meta["val"] for node in weights])
        return self._add_placeholder(Role("weight", joined), value)

    def add_constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A new constant, whose bytes travel with the weights."""
        self.tensors[name] = value
        return self._add_placeholder(Role("constant", name), self.fake_mode.from_tensor(value, static_shapes=True))

    def _add_placeholder(self, role: Role, value: Any) -> fx.Node:
        last = list(self.graph.find_nodes(op="placeholder"))[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(re.sub(r"\W", "_", role.name))
        node.meta["val"] = value
        self.roles[node.name] = role
        return node

    def affine(self, expression: int | SymInt, where: str) -> Affine:
        """A size of the graph in the program's symbols. Raises `CaptureError` if it is not affine in them."""
        if isinstance(expression, int):
            return Affine(expression)
        polynomial = sympy.Poly(expression.node.expr, *self.symbols) if self.symbols else None
        if polynomial is None or polynomial.total_degree() > 1:
            raise CaptureError(f"{where}: the size {expression} is not affine in the step's sizes")
        terms = {}
        for symbol, name in self.symbols.items():
            if coefficient := int(polynomial.coeff_monomial(symbol)):
                terms[name] = coefficient
        return Affine(int(polynomial.coeff_monomial(1)), tuple(sorted(terms.items())))

    def fixed_size(self) -> str | None:
        """A size that has lost its symbol to one value, if any has: the graph would be right for that value alone."""
        replaced = self.shape_env.replacements
        return next((name for symbol, name in self.symbols.items() if symbol in replaced), None)

    def axis_of(self, node: fx.Node, symbol: str = "tokens") -> int | None:
        """The axis of a value that counts `symbol`, or None. Raises `CaptureError` where several axes depend on it."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        named = {name: s for s, name in self.symbols.items()}
        if symbol not in named:
            return None
        shape: Sequence[Any] = value.shape
        sizes = {i: d.node.expr for i, d in enumerate(shape) if isinstance(d, SymInt)}
        axes = [i for i, expression in sizes.items() if named[symbol] in expression.free_symbols]
        if not axes:
            return None
        if len(axes) > 1 or sizes[axes[0]] != named[symbol]:
            shape = [str(d) for d in value.shape]
            raise CaptureError(
                f"{describe(node)}: its shape {shape} does not keep the sequence on one axis of its own, "
                "so requests cannot be packed along it"
            )
        return axes[0]

    def propagate(self) -> None:
        """Recompile and bring every `meta["val"]` up to date; what is computed from what it was before stays as it is.

        Raises `CaptureError` where a call fixes a size of the step.
        """
        self.module.recompile()
        propagation = _Propagation(self)
        with enable_python_dispatcher():  # as torch.export does: some of torch 2.11 in C++ takes no symbolic sizes
            propagation.propagate_dont_convert_inputs(*(node.meta["val"] for node, _ in self.placeholders()))
        if propagation.fixed is not None:
            node, symbol = propagation.fixed
            raise CaptureError(
                f"{describe(node)}: torch computes it for one number of {symbol} only, so no step of another size "
                "could use it; express it with other operators"
            )


class _Propagation(FakeTensorProp):
    """Fake propagation that recomputes only what has changed, since a deep model has thousands of calls.

    It notices when a size stops being symbolic: torch then takes the hint for the size.
    """

    def __init__(self, step: StepGraph) -> None:
        super().__init__(step.module, step.fake_mode)
        self.step = step
        self.fixed: tuple[fx.Node, str] | None = None

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        before, old = n.meta.get("computed_from"), n.meta.get("val")
        now = n.target, n.args, n.kwargs, [_Same(source.meta.get("val")) for source in n.all_input_nodes]
        if before == now:
            return old
        result = super().run_node(n)
        n.meta["computed_from"] = now
        if before is not None and before[0] == n.target and _makes_memory(n) and _layout(old) == _layout(result):
            result = n.meta["val"] = old  # so what is computed from it need not be computed anew
        if self.fixed is None and (symbol := self.step.fixed_size()) is not None:
            self.fixed = n, symbol
        return result


def _makes_memory(node: fx.Node) -> bool:
    """Whether a call's one result never shares its memory with an input."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and [r.alias_info for r in schema.returns] == [None]


def _layout(value: Any) -> object:
    """All that fake propagation knows of a value but its memory; unlike anything else where it is no tensor."""
    if not isinstance(value, torch.Tensor):
        return object()
    sizes: Sequence[Any] = (*value.shape, *value.stride(), value.storage_offset())
    return value.dtype, value.device, [size if isinstance(size, int) else size.node.expr for size in sizes]


@dataclass(frozen=True, eq=False)
class _Same:
    """A value that equals itself alone: fake tensors cannot be compared."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

"""Translation validation: after each pass, the graph before and after it is run on the same random inputs.

The outputs must agree; where they do not, the first value that both graphs have and disagree on is named.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dllmc.errors import PassError
from dllmc.ir.program import Program
from dllmc.ir.provenance import describe
from dllmc.ir.step_graph import Role, StepGraph
from dllmc.ops.keep import KEEPING_FIELDS
from dllmc.passes.base import LogEntry, Observer, Pass, Values
from dllmc.passes.fuse_head import is_clear
from dllmc.spec import MAX_SUPPRESS_TOKENS

# Largest difference that rounding may make, relative to the largest number of the value.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Lengths of the segments that steps are made of: of one while a graph knows no segments, then of three.
ONE, SEVERAL = ((3,), (24,)), ((24,), (5, 1, 9))


Execute = Callable[[StepGraph, Values], Values]


class NumericCheck(Observer):
    """Raises `PassError` after a pass that changed what the step computes.

    `execute` runs the program of a step that has been planned; without it programs are not compared with their graph.
    `errors` holds the largest relative error of each pass that was checked, in order. Weights are needed: a model on
    the meta device cannot be verified.
    """

    def __init__(self, execute: Execute | None = None) -> None:
        self.errors: list[tuple[str, float]] = []
        self._execute = execute
        self._before: _Copy | None = None
        self._program: Program | None = None

    def before(self, current: Pass, step: StepGraph) -> None:
        if any(tensor.is_meta for tensor in step.tensors.values()):
            raise PassError("verify='numeric' runs the graph, but its weights are on the meta device; load them")
        self._before, self._program = _Copy(step), step.program

    def after(self, current: Pass, step: StepGraph, entry: LogEntry) -> None:
        before, after = self._before, _Copy(step)
        assert before is not None
        if entry.modified:
            several = "segments" in before.inputs & after.inputs
            cases = [random_inputs(step, lengths) for lengths in (SEVERAL if several else ONE)]
            if "cached" in after.inputs - before.inputs:  # the same as before where nothing is cached
                cases = [inputs | {"cached": torch.zeros_like(inputs["cached"])} for inputs in cases]
            errors = [_compare_graphs(current, step, before, after, inputs) for inputs in cases]
        elif (
            step.program is not None
            and step.program is not self._program
            and step.program.arena_bytes is not None
            and self._execute is not None
        ):
            cases = [random_inputs(step, lengths) for lengths in SEVERAL]
            both = [(after.run(inputs).expected, self._execute(step, inputs)) for inputs in cases]
            errors = [_compare(current, *outputs, after.tolerance, _in_the_program) for outputs in both]
        else:
            return
        self.errors.append((entry.text, max(errors)))


def random_inputs(step: StepGraph, lengths: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """All inputs and caches that a step can have, greedy and without guidance, for segments of these lengths.

    Lengths are cut to what the step can take; about half of each segment's tokens are rows of the head. Every second
    segment reads a cache; each of the others is a Refresh, and reads what it has just kept, so that a mistake there is
    seen in the same step.
    """
    generator = torch.Generator().manual_seed(seed)
    most = step.maxima
    segments = min(len(lengths), most["segments"], most["tokens"])
    longest = min(step.spec.max_positions, most["tokens"] // segments)
    cut = [min(length, longest) for length in lengths[:segments]]
    positions = torch.cat([torch.arange(length) for length in cut])
    of_token = torch.repeat_interleave(torch.arange(len(cut)), torch.tensor(cut))
    drawn = (torch.rand(len(positions), generator=generator) < 0.5).nonzero()[: most["rows"], 0]
    rows = drawn if len(drawn) else torch.tensor([0])
    ends, row_ends = (torch.bincount(of, minlength=len(cut)).cumsum(0) for of in (of_token, of_token[rows]))
    none = torch.zeros(len(cut), dtype=torch.int64)
    return {
        "token_ids": torch.randint(step.spec.vocab_size, positions.shape, generator=generator),
        "positions": positions,
        "segments": _spans(ends),
        "rows": rows,
        "row_spans": _spans(row_ends),
        "guided": none[:0],
        "guidance": none[:0].float(),
        "row_segment": of_token[rows],
        "row_position": positions[rows],
        "row_target": torch.full_like(rows, -1),
        "temperature": none.float(),
        "top_k": none,
        "top_p": torch.ones(len(cut)),
        "confidence_rule": none,
        "seed": none,
        "step": none,
        "suppressed": torch.full((len(cut), MAX_SUPPRESS_TOKENS), -1),
        **_cache_inputs(step, cut, generator),
    }


def _cache_inputs(step: StepGraph, lengths: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    """Caches of a page a segment and their tables. A Refresh's active span is the middle of its segment."""
    caches = {role.name: node.meta["val"] for node, role in step.placeholders() if role.kind == "cache"}
    if not caches:
        return {}
    page_tokens = next(iter(caches.values())).shape[3]
    low_precision = any(value.dtype.itemsize < 4 for value in caches.values())
    keeping: list[list[int]] = []
    cached: list[int] = []
    active: list[int] = []
    start = 0
    for index, length in enumerate(lengths):
        low, high = start + length // 3, start + length // 3 + (length + 2) // 3
        candidates = length - (high - low)
        # Rounding may change which of close scores is the highest, and does in low precision.
        count = min(candidates if low_precision else (candidates + 1) // 2, page_tokens)
        refresh = index % 2 == 0 and count > 0
        keeping.append([low, high, count, index // 2 % 2, 3] if refresh else [0] * KEEPING_FIELDS)
        cached.append(count if refresh else min(3 + index, page_tokens))
        active += range(low, high) if refresh else ()
        start += length
    width = step.input("page_table").meta["val"].shape[1]  # type: ignore[union-attr]
    table = torch.zeros(len(lengths), width, dtype=torch.int64)
    table[:, 0] = torch.arange(len(lengths))
    shapes = {name: [len(lengths) if isinstance(d, torch.SymInt) else d for d in c.shape] for name, c in caches.items()}
    drawn = {name: torch.randn(shape, generator=generator).to(caches[name].dtype) for name, shape in shapes.items()}
    tables = {"keeping": keeping, "cached": cached, "active": active}
    return {
        **drawn,
        "page_table": table,
        **{name: torch.tensor(rows, dtype=torch.int64) for name, rows in tables.items()},
    }


def _spans(ends: Tensor) -> Tensor:
    return torch.stack((torch.cat((ends.new_zeros(1), ends[:-1])), ends), dim=1)


class _Copy:
    """A graph as it is now, which runs on real tensors."""

    def __init__(self, step: StepGraph) -> None:
        self.tensors = step.tensors
        dtypes = {node.meta["val"].dtype for node, _ in step.placeholders()}
        self.tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes)
        self.outputs = step.outputs
        self.roles: list[Role] = [role for _, role in step.placeholders()]
        self.inputs = {role.name for role in self.roles if role.kind == "input"}
        copies: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.output(graph.graph_copy(step.graph, copies))
        self.module = fx.GraphModule(step.module, graph)
        self.originals = {copy: node for node, copy in copies.items()}

    @torch.no_grad()
    def run(self, inputs: Values) -> "_Run":
        """Run the graph on these inputs of a step, of which it takes what it has."""
        given = ("input", "cache")
        values = [inputs[role.name] if role.kind in given else self.tensors[role.name] for role in self.roles]
        interpreter = fx.Interpreter(self.module, garbage_collect_values=False)
        outputs = interpreter.run(*values)
        env = interpreter.env
        computed = {self.originals[n]: _tensors(v) for n, v in env.items() if n in self.originals}
        heads = self.module.graph.find_nodes(op="call_function", target=torch.ops.dllmc.decode_head.default)
        logits = [_logits(*(env[a] if isinstance(a, fx.Node) else a for a in head.args[:4])) for head in heads]
        return _Run(dict(zip(self.outputs, outputs, strict=True)), computed, *logits)


@dataclass(frozen=True)
class _Run:
    """What a graph returned, by name, what its calls made, by the node of the step, and the logits that it decoded."""

    outputs: Values
    computed: Mapping[fx.Node, list[Tensor]]
    logits: Tensor | None = None

    @property
    def expected(self) -> Values:
        """The outputs that an equal graph has, whatever it rounds."""
        if self.logits is None:
            return self.outputs
        return {**self.outputs, "token": self.outputs["token"].where(is_clear(self.logits), -1)}


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias) * scale


def _tensors(value: object) -> list[Tensor]:
    results = value if isinstance(value, list | tuple) else [value]
    return [result for result in results if isinstance(result, Tensor)]


def _compare_graphs(current: Pass, step: StepGraph, before: _Copy, after: _Copy, inputs: Values) -> float:
    was, now = before.run(inputs), after.run(inputs)
    expected, tolerance = current.expected(step, was.expected, inputs), max(before.tolerance, after.tolerance)
    return _compare(
        current, expected, now.outputs, tolerance, lambda: _first_difference(step, was.computed, now.computed)
    )


def _compare(current: Pass, expected: Values, found: Values, tolerance: float, where: Callable[[], str]) -> float:
    """The largest relative error of the outputs. Raises `PassError` where one is beyond what rounding explains."""
    if set(expected) != set(found):
        raise PassError(f"pass {current.name!r}: the step returns {sorted(found)}, expected {sorted(expected)}")
    errors = {name: _error(expected[name], found[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > tolerance:
        raise PassError(
            f"pass {current.name!r} changed what the step computes: the largest relative error of {worst!r} is "
            f"{errors[worst]:.2g}, expected at most {tolerance:.0e} on random inputs; {where()}"
        )
    return errors[worst]


def _error(expected: Tensor, found: Tensor) -> float:
    """The largest difference relative to the largest number; infinite where shapes or undefined values differ."""
    if expected.shape != found.shape:
        return math.inf
    if not expected.is_floating_point():
        return math.inf if (expected != found)[expected >= 0].any() else 0.0
    a, b = expected.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0
    largest = a[a.isfinite()].abs().max().clamp(min=1e-6) if a.isfinite().any() else torch.tensor(1.0)
    return float(((a - b).abs() / largest)[~same].nan_to_num(nan=math.inf).max())


def _in_the_program() -> str:
    return "the graph is as it was, the program made from it computes something else"


def _first_difference(step: StepGraph, old: Mapping[fx.Node, list[Tensor]], new: Mapping[fx.Node, list[Tensor]]) -> str:
    """The first call of the graph that made something else before the pass, and what it reads that the pass made."""
    for node in step.calls():
        if node not in old or node not in new:
            continue
        pairs = list(zip(old[node], new[node], strict=False))
        if any(a.shape != b.shape for a, b in pairs):
            continue
        errors = [error for a, b in pairs if (error := _error(a, b)) > TOLERANCES.get(a.dtype, 0.0)]
        if errors:
            made = [n.name for n in node.all_input_nodes if n not in old]
            by = f"; it reads {', '.join(made)}, which this pass made" if made else ""
            return f"the first value that differs is {describe(node)}, by {max(errors):.2g}{by}"
    return "no value that the graph had before differs"

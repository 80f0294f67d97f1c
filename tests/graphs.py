"""Tiny modules as step graphs, graphs as text, and graphs and programs run on real tensors.

What the tests of passes share: a pass is judged by the text of the graph before and after it, and by the numbers that
both compute.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn

from dllmc.capture import capture
from dllmc.ir.program import SYMBOLS
from dllmc.ir.step_graph import StepGraph
from dllmc.passes import pipeline
from dllmc.spec import MAX_SUPPRESS_TOKENS, ModelSpec
from tests.programs import executor_of

VOCAB, WIDTH, HEADS, HEAD_DIM = 13, 8, 2, 4
SPEC = ModelSpec(VOCAB, 0, (), max_positions=32)
MAXIMA = {"tokens": 64, "rows": 16, "guided": 8, "segments": 4, "active": 36}
GUIDANCE = 1.5

# What rounding may add to logits, relative to the largest, in a few calls.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

Body = Callable[[Any, Tensor], Tensor]


class Tiny(nn.Module):
    """token ids [1, T] -> logits [1, T, VOCAB]: an embedding, `body(module, x [1, T, WIDTH])`, then `head`.

    `constants` become buffers that are not saved, and attributes of the module.
    """

    def __init__(self, body: Body | None = None, head: Body | None = None, **constants: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.body = body or (lambda module, x: x)
        self.tail = head or (lambda module, x: module.head(x))
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.tail(self, self.body(self, self.embed(token_ids)))


def step_of(body: Body, head: Body | None = None, *, spec: ModelSpec = SPEC, **constants: Tensor) -> StepGraph:
    """`Tiny` with these parts, captured."""
    return captured(Tiny(body, head, **constants), spec)


def captured(module: nn.Module, spec: ModelSpec = SPEC) -> StepGraph:
    """A module, captured."""
    return capture(module, spec, MAXIMA)


def run(step: StepGraph, passes: str) -> pipeline.LogEntry:
    """Run a pipeline on the step, and return what its last pass did."""
    return pipeline.run(step, pipeline.parse(passes))[-1]


def rewritten(
    body: Body, passes: str, dtype: torch.dtype = torch.float32, **constants: Tensor
) -> tuple[StepGraph, pipeline.LogEntry]:
    """`Tiny` of a dtype after these passes, and what the last did; its logits are still those of float64 arithmetic."""
    module = Tiny(body, **constants).to(dtype)
    step = captured(module)
    entry = run(step, passes)
    inputs = step_inputs(9)
    with torch.no_grad():
        expected = deepcopy(module).double()(inputs["token_ids"][None])[0]
    found = execute(step, inputs)["logits"]
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()
    return step, entry


def run_all(step: StepGraph) -> StepGraph:
    """Run the default pipeline on the step."""
    run(step, pipeline.DEFAULT_PIPELINE)
    return step


def heads_of(x: Tensor, heads: int = HEADS) -> Tensor:
    """[1, T, heads * HEAD_DIM] -> [1, heads, T, HEAD_DIM]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def text(step: StepGraph) -> str:
    """A line a call, values by number, operators by their short names, sizes by theirs; `x` is `Tiny`'s embedding."""
    names: dict[fx.Node, str] = {node: role.name for node, role in step.placeholders()}
    lines = []
    for node in step.graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr":
            names[node] = str(node.target)
        elif isinstance(value, torch.SymInt):
            names[node] = str(step.affine(value, node.name))
        elif node.op == "call_function":
            given = [_argument(a, names) for a in node.args]
            given += [f"{key}={_argument(a, names)}" for key, a in node.kwargs.items()]
            call = f"{_short(node.target)}({', '.join(given)})"
            if call == "unsqueeze(token_ids, 0)":
                names[node] = "ids"
            elif call == "embedding(embed.weight, ids)":
                names[node] = "x"
            else:
                names[node] = str(len(lines))
                lines.append(f"{names[node]} = {call}")
    returned = zip(step.outputs, step.output_nodes(), strict=True)
    lines.append("return " + ", ".join(f"{name}={names[node]}" for name, node in returned))
    return "\n".join(lines)


def lines(shown: str) -> str:
    """The text of a graph as a test writes it, without indentation and empty lines."""
    return "\n".join(line.strip() for line in shown.strip().splitlines() if line.strip())


def operators(step: StepGraph) -> list[str]:
    """The short names of the operators that a lowered step calls, in order."""
    assert step.program is not None
    return [instruction.op.split(".")[-2 if "." in instruction.op else 0] for instruction in step.program.instructions]


def step_inputs(
    *lengths: int, rows: Sequence[int] = (), twins: Mapping[int, int] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """All inputs of a greedy step over segments of the given lengths, with random token ids.

    `rows`: packed indices. `twins`: for rows that are guided, by their number, the packed index of the twin.
    """
    twins = twins or {}
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([*accumulate(lengths)])
    starts = ends - torch.tensor(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])
    at = torch.tensor(rows, dtype=torch.int64)
    none = torch.zeros(len(lengths), dtype=torch.int64)
    all_rows = torch.tensor([*rows, *twins.values()], dtype=torch.int64)
    of_segment = torch.searchsorted(ends, all_rows, right=True)
    assert of_segment.equal(of_segment.sort().values), "a segment's rows stand together"
    row_ends = torch.bincount(of_segment, minlength=len(lengths)).cumsum(0)
    return {
        "token_ids": torch.randint(VOCAB, (sum(lengths),), generator=generator),
        "positions": positions,
        "segments": torch.stack((starts, ends), dim=1),
        "rows": all_rows,
        "row_spans": torch.stack((row_ends - torch.bincount(of_segment, minlength=len(lengths)), row_ends), dim=1),
        "guided": torch.tensor([*twins], dtype=torch.int64),
        "guidance": torch.full((len(twins),), GUIDANCE),
        "row_segment": torch.searchsorted(ends, at, right=True),
        "row_position": positions[at],
        "row_target": torch.full_like(positions[at], -1),
        "temperature": none.float(),
        "top_k": none,
        "top_p": torch.ones(len(lengths)),
        "confidence_rule": none,
        "seed": none,
        "step": none,
        "suppressed": torch.full((len(lengths), MAX_SUPPRESS_TOKENS), -1),
    }


def nothing_cached(step: StepGraph, segments: int) -> dict[str, Tensor]:
    """Empty tables, and caches of one page, for a step that has caches: no segment keeps or reads anything."""
    described = {role.name: node.meta["val"] for node, role in step.placeholders()}
    caches = [name for name in described if name.startswith("cache.")]
    if not caches:
        return {}
    tables = {
        "keeping": torch.zeros(segments, 5, dtype=torch.int64),
        "cached": torch.zeros(segments, dtype=torch.int64),
        "page_table": torch.zeros(segments, described["page_table"].shape[1], dtype=torch.int64),
        "active": torch.zeros(0, dtype=torch.int64),
    }
    shapes = {name: [1 if isinstance(d, torch.SymInt) else d for d in described[name].shape] for name in caches}
    return tables | {name: torch.zeros(shape, dtype=described[name].dtype) for name, shape in shapes.items()}


@torch.no_grad()
def execute(step: StepGraph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the step's graph eagerly; of `inputs` it takes those that it has. Outputs by name."""
    step.module.recompile()
    if "segments" in inputs:
        inputs = nothing_cached(step, len(inputs["segments"])) | dict(inputs)
    given = ("input", "cache")
    values = [(inputs if role.kind in given else step.tensors)[role.name] for _, role in step.placeholders()]
    return dict(zip(step.outputs, fx.Interpreter(step.module).run(*values), strict=True))


def execute_alone(step: StepGraph, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits [tokens, VOCAB] of each segment on its own, end to end, for a graph that is not packed yet."""
    sequences = [inputs["token_ids"][start:end] for start, end in inputs["segments"].tolist()]
    return torch.cat([execute(step, {**inputs, "token_ids": ids})["logits"] for ids in sequences])


def execute_program(step: StepGraph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the planned program as the runtime does. Outputs by name."""
    assert step.program is not None
    inputs = nothing_cached(step, len(inputs["segments"])) | dict(inputs)
    lengths = [len(inputs.get(name, ())) for name in ("token_ids", "row_segment", "guided", "segments", "active")]
    sizes = dict(zip(SYMBOLS, lengths, strict=True))
    executor = executor_of(step.program, {name: step.tensors[name] for name in step.program.weights})
    outputs = executor.run(sizes, {name: inputs[name].numpy() for name in step.program.inputs})
    return {name: torch.from_numpy(value.copy()) for name, value in outputs.items()}


def _argument(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).removeprefix("torch.")


def _short(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    return str(target).split(".")[-2] if "." in str(target) else str(getattr(target, "__name__", target))

"""chunk-activations: loops over chunks of rows, and as little as can be kept from one to the next."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dllmc.compiler import CompileOptions, rewrite
from dllmc.ir.program import CHUNK, ForRows
from dllmc.ir.step_graph import Loop, StepGraph, loop_of
from dllmc.passes import pipeline
from dllmc.passes.chunk_activations import ChunkActivations
from dllmc.passes.cse import CommonSubexpressions
from dllmc.passes.lower import Lower
from dllmc.passes.plan_memory import planned
from dllmc.passes.sizing import resized
from dllmc.spec import ModelSpec
from tests.graphs import captured
from tests.passes.two_layers import SPEC as TWO_LAYERS
from tests.passes.two_layers import Model, until

aten = torch.ops.aten
PRODUCTS = (aten.linear.default, torch.ops.dllmc.attention.default, torch.ops.dllmc.decode_head.default)
VOCAB, WIDTH, HEADS, LAYERS = 13, 8, 2, 4
SPEC = ModelSpec(VOCAB, 0, (), max_positions=64)
FLOAT_BYTES = 4


class Block(nn.Module):
    """One layer of a style: what is normed when, how many KV heads, one projection or three."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.kv_heads = 1 if style == "mqa" else HEADS
        kv = self.kv_heads * WIDTH // HEADS
        self.sizes = [WIDTH, kv, kv]
        self.norm, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, sum(self.sizes))
        self.q, self.k, self.v = (nn.Linear(WIDTH, size) for size in self.sizes)
        self.o, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def attend(self, y: Tensor) -> Tensor:
        parts = self.qkv(y).split(self.sizes, dim=-1) if self.style == "fused" else (self.q(y), self.k(y), self.v(y))
        q, k, v = (x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for x in parts)
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    def feed(self, y: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(y)))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "post":
            x = self.norm(x + self.attend(x))
            return self.second(x + self.feed(x))
        y = self.norm(x)
        if self.style == "parallel":
            return x + self.attend(y) + self.feed(y)
        x = x + self.attend(y)
        return x + self.feed(self.second(x))


class Styled(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.style = style
        self.embed, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Block(style) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids) + self.places(torch.arange(token_ids.shape[1]))
        first = x
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if self.style == "skip" and index == 0:
                first = x
        return self.head(self.norm(x + first if self.style == "skip" else x))


STYLES = ("pre", "post", "parallel", "mqa", "fused", "skip")
# Half of them in `make test`.
SOME = [pytest.param(style, marks=[pytest.mark.slow] if n % 2 else []) for n, style in enumerate(STYLES)]


def looped(
    model: nn.Module, spec: ModelSpec, chunk: int = 5, last: str = "chunk-activations", device: str = "cpu"
) -> StepGraph:
    others = {ChunkActivations: ChunkActivations(chunk), Lower: Lower(device)}
    passes = [others.get(type(p), p) for p in until(last)]
    step = captured(model, spec)
    pipeline.run(step, passes)
    return step


def products(step: StepGraph) -> Counter[object]:
    return Counter(node.target for node in step.calls(*PRODUCTS))


def kept(step: StepGraph) -> dict[Loop, list[fx.Node]]:
    """What calls of a loop read that another loop has computed, views seen through."""
    found: dict[Loop, dict[fx.Node, None]] = {}
    for node in step.calls():
        loop = loop_of(node)
        for source in node.all_input_nodes if loop is not None else ():
            if loop_of(source) not in (loop, None):
                assert loop is not None
                found.setdefault(loop, {})[source] = None
    return {loop: list(nodes) for loop, nodes in found.items()}


def test_without_a_chunk_the_graph_stays() -> None:
    step = captured(Model(), TWO_LAYERS)
    log = pipeline.run(step, until("chunk-activations"))
    assert not log[-1].modified
    assert CHUNK not in step.maxima
    assert all(loop_of(node) is None for node in step.calls())


def test_what_is_kept_between_loops_is_the_residual_stream() -> None:
    """Of each layer keys and values are made in a loop of their own; queries, attention and the rest in the next."""
    step = looped(Model(), TWO_LAYERS)
    loops = list(dict.fromkeys(loop for node in step.calls() if (loop := loop_of(node)) is not None))
    assert [loop.index for loop in loops] == list(range(len(loops)))
    reads = [kept(step).get(loop, []) for loop in loops]
    sizes = [str(loop.extent) for loop in loops]
    assert sizes[:5] == ["tokens", "active", "tokens", "tokens", "guided + rows"]
    keys, _, rest, last_keys, _ = loops[:5]
    assert reads[0] == reads[1] == []  # token ids and positions are enough, and for the active spans' queries too
    assert {node.name for node in reads[2]} == {n.name for n in kept_whole(step, keys)}
    [stream] = [node for node in reads[3] if loop_of(node) == rest]
    assert stream.target is aten.add.Tensor
    assert reads[4] == reads[5] == [stream]
    assert loop_of(stream) == rest
    assert sizes[5] == "active"
    assert set(kept_whole(step, last_keys)) < set(reads[7])
    assert sizes[7] == "guided + rows"


def kept_whole(step: StepGraph, loop: Loop) -> list[fx.Node]:
    """The keys and values that a loop makes: what attention reads of it."""
    attentions = step.calls(torch.ops.dllmc.attention.default)
    return [node for attention in attentions for node in attention.args[1:3] if loop_of(node) == loop]


@pytest.mark.parametrize("style", SOME)
def test_no_product_is_made_twice_and_loops_are_in_one_piece(style: str) -> None:
    before = captured(Styled(style), SPEC)
    pipeline.run(before, until("chunk-activations")[:-1])
    step = looped(Styled(style), SPEC)
    counted = products(before)
    counted[aten.linear.default] += LAYERS - 1  # of the active spans' queries; in the last layer they have one anyway
    if style == "fused":  # a projection for queries, one for keys and values; the last layer has the queries' twice
        counted[aten.linear.default] += LAYERS + 1
    assert products(step) == counted
    order = [loop_of(node) for node in step.calls()]
    runs = [loop for index, loop in enumerate(order) if loop is not None and (index == 0 or order[index - 1] != loop)]
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize("style", SOME)
@pytest.mark.parametrize("chunk", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 1000))])
def test_what_is_computed_stays(style: str, chunk: int) -> None:
    """The graph before and after the pass, and the program: the numeric check compares them on random steps."""
    text = pipeline.DEFAULT_PIPELINE.replace("chunk-activations", f"chunk-activations{{chunk={chunk}}}")
    step, trace = rewrite(Styled(style), SPEC, CompileOptions(64, 4, 16, passes=text, verify="numeric"))
    [entry] = [entry for entry in trace.passes if entry.text.startswith("chunk-activations")]
    assert entry.modified
    assert entry.error is not None
    assert step.program is not None
    assert any(isinstance(item, ForRows) for item in step.program.instructions)


@pytest.mark.parametrize(
    ("style", "widths", "device"),
    [
        ("pre", 3, "cpu"),  # residual stream, keys, values
        ("post", 3, "cpu"),
        ("parallel", 3, "cpu"),
        ("mqa", 2, "cpu"),  # one KV head of two: keys and values are half as wide
        ("mqa", 2, "cuda"),
        ("fused", 3, "cuda"),  # one projection of queries, keys and values is cut
        ("skip", 3, "cpu"),  # of the first layer's stream the wanted rows alone
    ],
)
def test_bytes_a_token(style: str, widths: int, device: str) -> None:
    """How the planned arena grows with the tokens of a step, chunks being one row."""
    step = looped(Styled(style), SPEC, 1, "reuse-in-place", device)
    assert step.program is not None
    arenas = []
    for tokens in (4096, 8192):
        maxima = {**step.program.maxima, "tokens": tokens}
        arenas.append(planned(resized(step.program, maxima)).arena_bytes or 0)
    # At a Refresh, a GPU scores and orders the keys of each KV head: a float32 and an int32.
    kept = (1 if style == "mqa" else 2) * 2 * 4 if device == "cuda" else 0
    assert arenas[1] - arenas[0] == 4096 * (widths * WIDTH * FLOAT_BYTES + kept)


@pytest.mark.parametrize("shifted", [False, True])
def test_rows_are_gathered_of_the_residual_stream(shifted: bool) -> None:
    """Not of its norm, which is computed on the rows again; positions are gathered, not tables of them."""
    step = looped(Model(), replace(TWO_LAYERS, shifted=shifted))
    sources = [node.args[0] for node in step.calls(aten.index_select.default)]
    whole = list({node for node in sources if isinstance(node, fx.Node) and loop_of(node) is not None})
    assert len(whole) == 1  # for the rows and for the active spans
    assert whole[0].target is aten.add.Tensor


def test_what_two_loops_compute_is_not_merged() -> None:
    """Cse leaves to each loop what it computes again, so that nothing more is kept."""
    step = looped(Model(), TWO_LAYERS)
    assert not CommonSubexpressions().run(step).modified

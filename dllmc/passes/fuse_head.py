"""The vocabulary head, its softmax and the choice of a token become one operator; no logits remain."""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dllmc.errors import CaptureError
from dllmc.ir.provenance import describe
from dllmc.ir.step_graph import StepGraph
from dllmc.ops import decode_head, guide_rows  # noqa: F401  (register the operators)
from dllmc.ops.facts import argument
from dllmc.passes.base import Pass, PassResult, Values
from dllmc.spec import MAX_SUPPRESS_TOKENS

aten = torch.ops.aten

# Logits that are closer than this may change places when they are rounded otherwise.
NEAR_TIE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class FuseHead(Pass):
    """linear(hidden, W [V, D]) -> logits becomes `dllmc::guide_rows` and `dllmc::decode_head`.

    Between the linear and the output may stand, in any order: a product with or a quotient by a constant (it
    becomes the operator's `scale`), conversions of dtype (statistics are float32 anyway), and the removal of the
    batch axis. Anything else, a soft cap say, is refused: guidance on hidden rows needs a linear head.
    The step then returns token [rows], confidence [rows], logprob [rows].
    """

    name = "fuse-head"
    requires = ("rows-selected",)
    ensures = ("head-fused",)

    def run(self, step: StepGraph) -> PassResult:
        (logits,) = step.output_nodes()
        linear, scale = _head(logits)
        hidden, weight, bias = (argument(linear, i) for i in range(3))
        shape = hidden.meta["val"].shape
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
            raise CaptureError(f"{describe(linear)}: expected hidden states [1, tokens, D], found {[*map(str, shape)]}")
        rows, guided, segments = (step.size(s) for s in ("rows", "guided", "segments"))
        inputs = [
            step.add_input(name, shape, dtype)
            for name, shape, dtype in (
                ("row_segment", (rows,), torch.int64),
                ("row_position", (rows,), torch.int64),
                ("row_target", (rows,), torch.int64),
                ("temperature", (segments,), torch.float32),
                ("top_k", (segments,), torch.int64),
                ("top_p", (segments,), torch.float32),
                ("confidence_rule", (segments,), torch.int64),
                ("seed", (segments,), torch.int64),
                ("step", (segments,), torch.int64),
                ("suppressed", (segments, MAX_SUPPRESS_TOKENS), torch.int64),
            )
        ]
        twins = step.add_input("guided", (guided,), torch.int64)
        guidance = step.add_input("guidance", (guided,), torch.float32)
        call = step.graph.call_function
        with step.graph.inserting_before(step.graph.output_node()):
            if len(shape) == 3:
                hidden = call(aten.select.int, (hidden, 0, 0))
            combined = call(torch.ops.dllmc.guide_rows.default, (hidden, twins, guidance))
            head = call(torch.ops.dllmc.decode_head.default, (combined, weight, bias, scale, *inputs))
            head.meta["stack_trace"] = linear.meta.get("stack_trace", "")
            picked = [call(operator.getitem, (head, i)) for i in range(3)]
        step.set_outputs(token=picked[0], confidence=picked[1], logprob=picked[2])
        return PassResult(True, {"vocab": step.spec.vocab_size})

    def expected(self, step: StepGraph, before: Values, inputs: Values) -> Values:
        """Of greedy steps without guidance: the best token, where one is clearly best, and its probability."""
        best = before["logits"].double().log_softmax(dim=-1).max(dim=-1)
        token, logprob = best.indices.where(is_clear(before["logits"]), -1), best.values.float()
        return {"token": token, "confidence": logprob.exp(), "logprob": logprob}


def is_clear(logits: Tensor) -> Tensor:
    """Of which rows [rows] of logits [rows, V] one token is best however they are rounded."""
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1] > NEAR_TIE[logits.dtype]


def _head(node: fx.Node) -> tuple[fx.Node, float]:
    """The vocabulary linear behind the logits, and the factor between the two."""
    scale = 1.0
    while node.target is not aten.linear.default:
        source, other = (*node.args, None)[:2]
        if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(other, int | float):
            scale *= other
        elif node.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(other, int | float):
            scale /= other
        elif node.target not in (aten.to.dtype, aten.select.int, aten.squeeze.dim):
            raise CaptureError(
                f"{describe(node)}: expected logits that are a linear of the hidden state, times a constant; "
                "this call lies between"
            )
        assert isinstance(source, fx.Node)
        node = source
    return node, scale

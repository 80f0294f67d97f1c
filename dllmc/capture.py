"""nn.Module -> StepGraph: torch.export at batch 1 with a symbolic length.

Nothing about a model is known here but that it maps token ids to logits. What the graph must look like for
packed steps is the business of the passes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from dllmc.errors import CaptureError
from dllmc.ir.step_graph import HINTS, Role, StepGraph
from dllmc.spec import ModelSpec

_PREFIX = "module."


class _Step(nn.Module):
    """token_ids [tokens] -> logits [tokens, V]: one sequence through a module of the usual signature."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, token_ids: Tensor) -> Tensor:
        output = self.module(token_ids[None])
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[0]


def capture(module: nn.Module, spec: ModelSpec, maxima: dict[str, int]) -> StepGraph:
    """Export one denoising step of a module that maps token ids [1, T] to logits [1, T, V] (or `.logits`).

    `maxima`: the largest sizes of a step. The module is put in eval mode. Raises `CaptureError`.
    """
    module.eval()
    lengths = Dim("tokens", min=2, max=spec.max_positions)
    example = torch.zeros(min(HINTS["tokens"], spec.max_positions), dtype=torch.int64)
    try:
        exported = torch.export.export(_Step(module), (example,), dynamic_shapes=({0: lengths},), strict=False)
    except Exception as error:
        raise CaptureError(
            f"torch.export could not capture {type(module).__name__} with a symbolic length: {_first_line(error)}\n"
            "Expected a module whose forward takes token ids [1, T] for any T and branches on no data."
        ) from error
    return _step_graph(exported, spec, maxima)


def _step_graph(exported: ExportedProgram, spec: ModelSpec, maxima: dict[str, int]) -> StepGraph:
    module = exported.graph_module
    roles: dict[str, Role] = {}
    tensors: dict[str, Tensor] = {}
    values = {**exported.state_dict, **exported.constants}
    names_of: dict[int, str] = {}  # a tied weight is one tensor under several names
    for item in exported.graph_signature.input_specs:
        placeholder: Any = item.arg
        if item.kind == InputKind.USER_INPUT:
            roles[placeholder.name] = Role("input", "token_ids")
            continue
        if item.target is None or item.target not in values:
            raise CaptureError(f"input {placeholder.name!r} of kind {item.kind.name} has no value; expected a tensor")
        value = values[item.target]
        is_weight = item.kind == InputKind.PARAMETER or (item.kind == InputKind.BUFFER and bool(item.persistent))
        name = names_of.setdefault(id(value), item.target.removeprefix(_PREFIX))
        roles[placeholder.name] = Role("weight" if is_weight else "constant", name)
        tensors[name] = value.detach()
    inputs = module.graph.find_nodes(op="placeholder")
    tokens = next(n for n in inputs if roles[n.name].kind == "input").meta["val"]
    step = StepGraph(module, spec, maxima, tokens.fake_mode, roles, tensors, {})
    step.symbols[tokens.shape[0].node.expr] = "tokens"
    step._sizes["tokens"] = tokens.shape[0]
    (logits,) = step.output_nodes()
    shape = tuple(logits.meta["val"].shape)
    if len(shape) != 2 or shape[1] != spec.vocab_size:
        raise CaptureError(f"expected logits [tokens, {spec.vocab_size}] of the spec's vocab_size, found {shape}")
    return step


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""nn.Module -> StepGraph: torch.export at batch 1 with a symbolic length.

Nothing about a model is known here but that it maps token ids to logits. What the graph must look like for
packed steps is the business of the passes.
"""

import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from dllmc.errors import CaptureError
from dllmc.ir.step_graph import HINTS, Role, StepGraph, Tensors, is_users, line_of
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
    example = torch.zeros(min(HINTS["tokens"], spec.max_positions), dtype=torch.int64)
    try:
        lengths = Dim("tokens", min=2, max=spec.max_positions)
        exported = torch.export.export(_Step(module), (example,), dynamic_shapes=({0: lengths},), strict=False)
        if not _is_functional(exported):
            exported = exported.run_decompositions({})  # no operator is decomposed, writes in place go
    except Exception as error:
        raise CaptureError(
            f"torch.export could not capture {type(module).__name__} with a symbolic length: {_reason(error)}\n"
            f"Expected a module whose forward takes token ids [1, T] for any T up to {spec.max_positions} "
            "(the spec's max_positions) and branches on no data."
        ) from error
    for item in exported.graph_signature.output_specs:
        if item.kind != OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"{type(module).__name__} writes to its own tensor {str(item.target).removeprefix(_PREFIX)!r} "
                "in forward; expected a forward pass that changes nothing, for steps are to be independent"
            )
    return _step_graph(exported, spec, maxima)


def _is_functional(exported: ExportedProgram) -> bool:
    """Whether no operator writes in place, in wrapped regions neither."""
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    schemas = [getattr(node.target, "_schema", None) for graph in graphs for node in graph.nodes]
    return not any(schema is not None and schema.is_mutable for schema in schemas)


def _step_graph(exported: ExportedProgram, spec: ModelSpec, maxima: dict[str, int]) -> StepGraph:
    module = exported.graph_module
    roles: dict[str, Role] = {}
    tensors: dict[str, Tensor] = {}
    copied: list[str] = []
    values = {**exported.state_dict, **exported.constants}
    names_of: dict[Any, str] = {}  # a tied weight is one tensor under several names
    storages: set[int] = set()
    for item in exported.graph_signature.input_specs:
        placeholder: Any = item.arg
        if item.kind == InputKind.USER_INPUT:
            roles[placeholder.name] = Role("input", "token_ids")
            continue
        if item.target is None or item.target not in values:
            raise CaptureError(f"input {placeholder.name!r} of kind {item.kind.name} has no value; expected a tensor")
        value = values[item.target].detach()
        storage = value.untyped_storage()
        place = storage._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype
        name = names_of.setdefault(place, _name_of(item.target))
        is_weight = item.kind == InputKind.PARAMETER or (item.kind == InputKind.BUFFER and bool(item.persistent))
        roles[placeholder.name] = Role("weight" if is_weight else "constant", name)
        if name not in tensors:
            # In a program each weight has memory of its own, all of it, in row-major order.
            alone = storage._cdata not in storages and storage.nbytes() == value.nbytes and value.is_contiguous()
            tensors[name] = value if alone else value.clone(memory_format=torch.contiguous_format)
            copied += [] if alone else [name]
            storages.add(storage._cdata)
    inputs = module.graph.find_nodes(op="placeholder")
    tokens = next(n for n in inputs if roles[n.name].kind == "input").meta["val"]
    step = StepGraph(module, spec, maxima, tokens.fake_mode, roles, Tensors(tensors), {})
    step.symbols[tokens.shape[0].node.expr] = "tokens"
    step._sizes["tokens"] = tokens.shape[0]
    (logits,) = step.output_nodes()
    shape = tuple(logits.meta["val"].shape)
    if len(shape) != 2 or shape[1] != spec.vocab_size:
        raise CaptureError(f"expected logits [tokens, {spec.vocab_size}] of the spec's vocab_size, found {shape}")
    if copied:
        fakes = {name: step.fake_mode.from_tensor(tensors[name], static_shapes=True) for name in copied}
        for node, role in step.placeholders():
            node.meta["val"] = fakes.get(role.name, node.meta["val"])
        step.propagate()
    return step


def _name_of(target: str) -> str:
    """A tensor's name in the module; always with a dot, which tells it from the names of a step's inputs."""
    name = target.removeprefix(_PREFIX)
    return name if "." in name else f"self.{name}"


def _reason(error: Exception) -> str:
    """The first paragraph of an error of torch.export, and the line in the user's model that it came from."""
    text = " ".join(line.strip() for line in str(error).strip().split("\n\n")[0].splitlines())
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    at = f" at {line_of(frames[-1].filename, frames[-1].lineno, frames[-1].name, frames[-1].line)}" if frames else ""
    return f"{text or type(error).__name__}{at}"

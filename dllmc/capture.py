"""nn.Module -> StepGraph: torch.export at batch 1 with a symbolic length.

Nothing about a model is known here but that it maps token ids, and positions where it takes them, to logits. What the
graph must look like for packed steps is the business of the passes. Weights may lie on the meta device.
"""

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from dllmc.errors import CaptureError
from dllmc.ir.provenance import is_users, line_of
from dllmc.ir.step_graph import HINTS, Role, StepGraph, Tensors
from dllmc.spec import ModelSpec

_PREFIX = "module."


# Tokens of the forward passes that find out how a module counts positions.
_PROBE_TOKENS = 7


class _Step(nn.Module):
    """token_ids [tokens] -> logits [tokens, V]: one sequence through a module of the usual signature.

    `first_position`: what the module's `position_ids` count from; None where it is to find positions on its own.
    """

    def __init__(self, module: nn.Module, first_position: int | None) -> None:
        super().__init__()
        self.module = module
        self.first_position = first_position

    def forward(self, token_ids: Tensor) -> Tensor:
        options = {}
        if self.first_position is not None:
            positions = torch.arange(token_ids.shape[0])
            options["position_ids"] = (positions + self.first_position if self.first_position else positions)[None]
        output = self.module(token_ids[None], **options)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[0]


def capture(module: nn.Module, spec: ModelSpec, maxima: dict[str, int]) -> StepGraph:
    """Export one denoising step of a module that maps token ids [1, T] to logits [1, T, V] (or `.logits`).

    `maxima`: the largest sizes of a step. The module is put in eval mode. Where its forward takes `position_ids`, it
    gets them: models that make positions of their own may take them from the values of tokens. What it has on the
    meta device is captured as if it were on the CPU, and has no value. Raises `CaptureError`.
    """
    module.eval()
    example = torch.zeros(min(HINTS["tokens"], spec.max_positions), dtype=torch.int64)
    try:
        lengths = Dim("tokens", min=2, max=spec.max_positions)
        wrapped = _Step(module, _first_position(module, spec))
        with _stand_ins(module):
            exported = torch.export.export(wrapped, (example,), dynamic_shapes=({0: lengths},), strict=False)
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


def _first_position(module: nn.Module, spec: ModelSpec) -> int | None:
    """What the module's `position_ids` count from; None where it takes none, or counts in a way that is not known.

    Logits of ordinary tokens say which: 0, or, as in RoBERTa, the position behind that of padding. A module without
    values cannot be asked.
    """
    parameter = inspect.signature(module.forward).parameters.get("position_ids")
    if parameter is None:
        return None
    has_values = not any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers()))
    if parameter.default is parameter.empty or not has_values:
        return 0
    padding = getattr(getattr(module, "config", None), "pad_token_id", None)
    special = {spec.mask_id, *spec.end_ids, padding}
    ordinary = [token for token in range(spec.vocab_size) if token not in special] or [spec.mask_id]
    ids = torch.tensor(ordinary[: min(_PROBE_TOKENS, spec.max_positions)])
    with torch.no_grad():
        expected = _Step(module, None)(ids)
        for first in (0,) if padding is None else (0, padding + 1):
            try:
                found = _Step(module, first)(ids)
            except (IndexError, RuntimeError):  # beyond its table of positions, or of another shape than it takes
                continue
            rounding = torch.finfo(expected.dtype).eps ** 0.5
            if (found - expected).abs().max() <= rounding * expected.abs().max():
                return first
    return None


@contextmanager
def _stand_ins(module: nn.Module) -> Iterator[None]:
    """Meanwhile tensors on the meta device are fake ones of the CPU, which have no memory either."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    for part in module.modules():
        groups: tuple[dict[str, Any], ...] = part._parameters, part._buffers
        for group in groups:
            replaced += [(group, name, t) for name, t in group.items() if t is not None and t.is_meta]
    made: dict[Any, Tensor] = {}  # a tied weight stays one
    try:
        with FakeTensorMode():
            for group, name, tensor in replaced:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                fake = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
                group[name] = made.setdefault(_place(tensor), fake)
        yield
    finally:
        for group, name, tensor in replaced:
            group[name] = tensor


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors have in common exactly if they are one in memory."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _is_functional(exported: ExportedProgram) -> bool:
    """Whether no operator writes in place, in wrapped regions neither; `detach_` writes nothing."""
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes} - {torch.ops.aten.detach_.default}
    schemas = [getattr(target, "_schema", None) for target in targets]
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
        name = names_of.setdefault(_place(value), _name_of(item.target))
        is_weight = item.kind == InputKind.PARAMETER or (item.kind == InputKind.BUFFER and bool(item.persistent))
        roles[placeholder.name] = Role("weight" if is_weight else "constant", name)
        if name not in tensors:
            # In a program each weight has memory of its own, all of it, in row-major order.
            alone = storage._cdata not in storages and storage.nbytes() == value.nbytes and value.is_contiguous()
            if isinstance(value, FakeTensor):
                value = torch.empty(value.shape, dtype=value.dtype, device="meta")
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

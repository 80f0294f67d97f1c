"""Torch-TensorRT: each program of an artifact as engines for its plain torch calls, and dllmc's operators in torch.

Not tested on hardware. TensorRT needs an NVIDIA GPU and the package torch_tensorrt; without it `dry_run` tells how
dllmc itself would cut the graph: at its own operators, which a compiler for TensorRT is told to leave to torch.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from dllmc.artifact import Artifact
from dllmc.errors import ExportError
from dllmc.export import Exported, sizes
from dllmc.export.torch_step import LEAST_SIZES, exported
from dllmc.ir.program import Program, Tensor

_MODULE = "torch_tensorrt"
# Operators that look at sizes or types, or at a tensor in another way.
_NO_WORK = frozenset(
    f"aten::{name}"
    for name in (
        *("_assert_scalar", "_assert_tensor_metadata", "alias", "permute", "reshape", "slice", "squeeze", "sym_size"),
        *("to", "unsqueeze", "view"),
    )
)


@dataclass(frozen=True)
class Partition:
    """Neighbouring calls of a graph that run in one place: in TensorRT, or else in torch. `calls`: their operators."""

    in_tensorrt: bool
    calls: tuple[str, ...]


def export(artifact: Artifact, out: Path, *, dry_run: bool = False) -> Exported:
    """Write `<program>.ep` for each program to `out`; with `dry_run` write nothing. Reports the partitions.

    Raises `ExportError` where torch_tensorrt is not installed, or there is no GPU; a dry run needs neither.
    """
    available = importlib.util.find_spec(_MODULE) is not None
    if not dry_run:
        _require_tensorrt(available)
    device = "cuda" if torch.cuda.is_available() and available else "cpu"
    weights = {name: weight.to(device) for name, weight in artifact.load_weights().items()}
    reports = []
    for program in artifact.programs.values():
        step = exported(program, weights)
        reports.append(f"program {program.name!r}: {report(step)}")
        if not available:
            continue
        compiler = importlib.import_module(_MODULE)
        shapes = {
            group: {name: compiler.Input(**_shapes(tensor, program)) for name, tensor in tensors.items()}
            for group, tensors in (("inputs", program.inputs), ("caches", program.caches))
        }
        compiled = compiler.dynamo.compile(
            step, kwarg_inputs=shapes, torch_executed_ops=left_to_torch(step), min_block_size=1, dryrun=dry_run
        )
        if not dry_run:
            out.mkdir(parents=True, exist_ok=True)
            compiler.save(compiled, str(out / f"{program.name}.ep"), kwarg_inputs=step.example_inputs[1])
    return Exported(out, {} if dry_run else sizes(out), "\n".join(reports))


def partitions(step: ExportedProgram) -> list[Partition]:
    """The graph cut at the calls that are left to torch: those of dllmc's operators."""
    return [
        Partition(in_tensorrt, tuple(str(node.target) for node in nodes))
        for in_tensorrt, nodes in groupby(_calls(step), key=lambda node: not _is_dllmc(node))
    ]


def left_to_torch(step: ExportedProgram) -> set[Any]:
    """The operators of the graph that TensorRT is not to take."""
    return {node.target for node in _calls(step) if _is_dllmc(node)}


def report(step: ExportedProgram) -> str:
    """The partitions as dllmc cuts the graph, in lines; TensorRT may leave more to torch than this."""
    found = partitions(step)
    engines = [part for part in found if part.in_tensorrt]
    lines = [
        f"dllmc's own cut of the graph: {len(engines)} partitions for TensorRT with "
        f"{sum(len(part.calls) for part in engines)} calls, the rest in torch"
    ]
    lines += [
        f"  TensorRT  {len(part.calls)} calls" if part.in_tensorrt else f"  torch     {', '.join(part.calls)}"
        for part in found
    ]
    return "\n".join(lines)


def _shapes(tensor: Tensor, program: Program) -> dict[str, Any]:
    """The shapes between which a tensor's lies, as `torch_tensorrt.Input` takes them."""
    most = [dim.at(program.maxima) for dim in tensor.shape]
    least = [sum((c * LEAST_SIZES[s] for s, c in dim.terms), dim.constant) for dim in tensor.shape]
    return {"min_shape": least, "opt_shape": most, "max_shape": most, "dtype": getattr(torch, tensor.dtype)}


def _calls(step: ExportedProgram) -> Iterator[fx.Node]:
    """The graph's calls of operators that compute something."""
    for node in step.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name not in _NO_WORK:
            yield node


def _is_dllmc(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "dllmc"


def _require_tensorrt(available: bool) -> None:
    if not available:
        raise ExportError(
            "exporting to TensorRT needs the package torch_tensorrt, which is not installed, and an NVIDIA GPU; run "
            "pip install 'dllmc[tensorrt]' on a machine that has one, or look at the partitions with --dry-run"
        )
    if not torch.cuda.is_available():
        raise ExportError(
            "exporting to TensorRT builds engines on an NVIDIA GPU, and torch finds none; run it on a machine that has "
            "one, or look at the partitions with --dry-run"
        )

"""Artifacts as ONNX models: one a phase, in standard operators, for any runtime that knows opset 23.

    OUT/dense.onnx, and where the artifact has caches OUT/refresh.onnx and OUT/reuse.onnx
    OUT/weights.bin    the weights of all of them, as external data
    OUT/model.json     what a decoder must know: the model spec, tokens of a page, inputs and outputs
    OUT/...            the tokenizer's files

A model takes what an engine gives a program (`dllmc.ir.interface.INPUTS`), whatever the step's sizes, and returns
`token`, `confidence`, `logprob` [rows]. Keys and values are inputs `cache.N` [2, kv_heads, pages, page_tokens,
head_dim], and where a step writes them outputs `cache.N.updated`.
"""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dllmc.artifact import Artifact, directory, documents
from dllmc.errors import ExportError
from dllmc.export import MODEL, Exported, is_export, sizes
from dllmc.ir.program import Program, aligned

PHASES = ("dense", "refresh", "reuse")
WEIGHTS = "weights.bin"
FORMAT = "dllmc-onnx"
SCHEMA = 1


def export(artifact: Artifact, out: Path, *, logits: bool = False, keep_custom_ops: bool = False) -> Exported:
    """Write an artifact's phases as ONNX models into the directory `out`; an older export there is replaced.

    logits: return clean logits too, `logits` [rows, vocab] float32. keep_custom_ops: leave dllmc's operators as nodes
    of the domain `dllmc`, each with a function that says it in standard ones, for runtimes that have their own.
    Raises `ExportError`, without the package onnx too, and `ArtifactError` where the disk refuses.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError("ONNX models are written by the package onnx; pip install 'dllmc[onnx]'") from error
    from dllmc.export.onnx.step import model_of

    programs = {name: artifact.programs[name] for name in PHASES if name in artifact.programs}
    with directory.replacing(out, partial(is_export, form=FORMAT), "ONNX export") as building:
        places = _write_weights(building / WEIGHTS, programs, artifact.load_weights())
        for name, program in programs.items():
            model = model_of(program, WEIGHTS, logits=logits, keep_custom_ops=keep_custom_ops)
            for tensor in model.graph.initializer:
                for key, value in zip(("offset", "length"), places[tensor.name], strict=True):
                    tensor.external_data.add(key=key, value=str(value))
            file = building / f"{name}.onnx"
            file.write_bytes(model.SerializeToString(deterministic=True))
            onnx.checker.check_model(file, full_check=True)
        for name in artifact.manifest["tokenizer"]:
            shutil.copyfile(artifact.path / name, building / name)
        documents.dump(building / MODEL, _document(artifact, programs))
        files = sizes(building)
    return Exported(out, files)


def _write_weights(
    file: Path, programs: Mapping[str, Program], weights: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int, int]]:
    """One file of all weights, each aligned; where each begins, and its bytes."""
    places = {}
    with file.open("wb") as stream:
        for name in sorted({name for program in programs.values() for name in program.weights}):
            tensor = weights[name].contiguous()
            stream.write(bytes(aligned(stream.tell()) - stream.tell()))
            places[name] = (stream.tell(), tensor.nbytes)
            tensor.view(-1).view(torch.uint8).numpy().tofile(stream)
    return places


def _document(artifact: Artifact, programs: Mapping[str, Program]) -> dict[str, Any]:
    program = artifact.program
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "model": artifact.spec.to_dict(),
        "page_tokens": program.page_tokens,
        "caches": {
            name: {"dtype": cache.dtype, "shape": [str(dim) if dim.terms else dim.constant for dim in cache.shape]}
            for name, cache in program.caches.items()
        },
        "inputs": {name: sorted(each.inputs) for name, each in programs.items()},
    }

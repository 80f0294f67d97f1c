"""AOTInductor: each program of an artifact as a package of native code, and how to run one.

An export is a folder: `model.json` tells what a step takes and returns, `<program>.pt2` is Inductor's package, and
`artifact/` is the artifact that it was made from. Packages hold no weights: all of them use the artifact's, mapped from
its files. What `dllmc.export.torch_step` keeps are calls of dllmc's operators, so a process that loads a package needs
dllmc's runtime, but no compiler.

Packages are native code, which runs when it is loaded, and which no check makes safe: `load` asks for trust.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllmc import artifact as artifacts
from dllmc.artifact import Artifact, directory, documents
from dllmc.errors import ArtifactError, ExportError, ProgramError
from dllmc.export import MODEL, Exported, is_export, sizes
from dllmc.export.torch_step import LEAST_SIZES, exported, weight_names
from dllmc.ir.program import PAGES, SYMBOLS, Program, Sizes
from dllmc.ir.program import Tensor as Spec

Array = np.ndarray[Any, np.dtype[Any]]

_ARTIFACT, _FORMAT = "artifact", "dllmc-aoti"
_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "realize_reads_threshold": 1,  # else the residual stream is summed anew in each layer, of all layers' outputs
    "allow_buffer_reuse": False,  # what waits to be used again is memory too
    "reorder_for_locality": False,  # what is kept at a Refresh is kept before the next layer, not behind the last
    "score_fusion_memory_threshold": 1 << 16,  # calls far apart are not one because they read a few indices both
}


def export(artifact: Artifact, out: Path, *, programs: Iterable[str] | None = None) -> Exported:
    """Write an export of an artifact's programs, all or some, into the directory `out`; an older one is replaced.

    Takes about half a minute a program, and a C++ compiler. Raises `ExportError`, and `ArtifactError` where the disk
    refuses.
    """
    if artifact.manifest["linked"]:
        raise ExportError(
            f"{artifact.path}: an export has the artifact in it, and its weights are linked; copy them at compiling"
        )
    chosen = {name: artifact.programs[name] for name in programs or artifact.programs}
    weights = artifact.load_weights()
    with directory.replacing(Path(out), partial(is_export, form=_FORMAT), "AOTInductor export") as building:
        shutil.copytree(artifact.path, building / _ARTIFACT)
        packages = [_compiled(program, weights, building / f"{name}.pt2") for name, program in chosen.items()]
        model = {
            "format": _FORMAT,
            "versions": {"dllmc": version("dllmc"), "torch": torch.__version__},
            "spec": artifact.spec.to_dict(),
            "programs": {
                program.name: {"package": file.name, "sha256": directory.sha256(file), **_interface(program)}
                for program, file in zip(chosen.values(), packages, strict=True)
            },
        }
        documents.dump(building / MODEL, model)
        files = sizes(building)
    return Exported(Path(out), files)


def load(folder: str | Path, *, trust: bool = False) -> "Export":
    """Open an export: hashes are checked, then the packages' code is loaded. Raises `ExportError` without `trust`."""
    folder = Path(folder)
    if not trust:
        raise ExportError(
            f"{folder}: an export holds native code, which runs when it is loaded; if you know who made it, load it "
            "with trust=True, or --trust"
        )
    if not is_export(folder, _FORMAT):
        raise ExportError(f"{folder / MODEL}: expected the model.json of an AOTInductor export, found none")
    try:
        programs = documents.load(folder / MODEL)["programs"].items()
        hashes = {str(name): entry["sha256"] for name, entry in programs}
    except (TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{folder / MODEL}: expected the programs of an export, found {error!r}") from error
    try:
        artifact = artifacts.read(folder / _ARTIFACT)
    except ArtifactError as error:
        raise ExportError(f"{folder}: the artifact in it: {error}") from error
    for name, expected in hashes.items():
        if name not in artifact.programs:
            raise ExportError(f"{folder / MODEL}: program {name!r} is not in the artifact; export it again")
        file = folder / f"{name}.pt2"
        found = directory.sha256(file) if file.is_file() else "no file"
        if found != expected:
            raise ExportError(f"{file}: expected sha256 {expected}, found {found}; copy the export again")
    weights = artifact.load_weights()
    caches = _caches(artifact.program)
    steps = {name: Step(artifact.programs[name], folder / f"{name}.pt2", weights, caches) for name in hashes}
    return Export(artifact, steps)


@dataclass(frozen=True)
class Export:
    """A loaded export. `steps`: by the name of the program."""

    artifact: Artifact
    steps: Mapping[str, "Step"]


class Step:
    """A package that runs as `dllmc.runtime.executor.Executor` does, over weights and caches that others may share."""

    def __init__(self, program: Program, package: Path, weights: Mapping[str, Tensor], caches: Mapping[str, Tensor]):
        self.program = program
        self.caches = {name: caches[name] for name in program.caches}
        self._package = torch._inductor.aoti_load_package(str(package))
        names = weight_names(program)
        constants = {name: weights[names[name]] for name in self._package.get_constant_fqns()}
        self._package.load_constants(constants, check_full_update=True, user_managed=True)

    def run(self, sizes: Sizes, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One step. `inputs`: every input of the program, in its shape for `sizes`.

        Raises `ProgramError` for sizes beyond the program's maxima, and for an input of another dtype or shape.
        """
        for symbol in SYMBOLS:
            least, most = min(LEAST_SIZES[symbol], self.program.maxima[symbol]), self.program.maxima[symbol]
            if not least <= sizes[symbol] <= most:
                found = f"expected {least} to {most} {symbol} a step, found {sizes[symbol]}"
                raise ProgramError(f"program {self.program.name!r}: {found}")
        given = {name: _checked(name, spec, inputs.get(name), sizes) for name, spec in self.program.inputs.items()}
        outputs = self._package(inputs=given, caches=self.caches)
        return {name: outputs[name].numpy() for name in self.program.outputs}


def _compiled(program: Program, weights: Mapping[str, Tensor], out: Path) -> Path:
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        step = exported(program, weights)
        return Path(torch._inductor.aoti_compile_and_package(step, package_path=str(out), inductor_configs=_OPTIONS))
    except InvalidCxxCompiler as error:
        raise ExportError(
            "AOTInductor needs a C++ compiler, and there is none; install g++, or name one by CXX"
        ) from error


def _interface(program: Program) -> dict[str, Any]:
    """What a step takes and returns, in order; shapes in the sizes of a step."""

    def listed(tensors: Mapping[str, Spec]) -> list[dict[str, Any]]:
        return [{"name": k, "dtype": t.dtype, "shape": [str(dim) for dim in t.shape]} for k, t in tensors.items()]

    return {
        "maxima": program.maxima,
        "least": {symbol: least for symbol, least in LEAST_SIZES.items() if symbol in program.maxima},
        "inputs": listed(program.inputs),
        "caches": listed(program.caches),
        "outputs": list(program.outputs),
        "constants": weight_names(program),
    }


def _caches(program: Program) -> dict[str, Tensor]:
    """The KV pool of an engine, empty."""
    sizes = {PAGES: max(program.maxima.get(PAGES, 0), LEAST_SIZES[PAGES])}
    return {
        name: torch.zeros([dim.at(sizes) for dim in spec.shape], dtype=getattr(torch, spec.dtype))
        for name, spec in program.caches.items()
    }


def _checked(name: str, spec: Spec, given: Array | None, sizes: Sizes) -> Tensor:
    shape = tuple(dim.at(sizes) for dim in spec.shape)
    if given is None or given.dtype.name != spec.dtype or given.shape != shape:
        found = "nothing" if given is None else f"{given.dtype} {list(given.shape)}"
        raise ProgramError(f"input {name!r}: expected {spec.dtype} {list(shape)}, found {found}")
    return torch.from_numpy(np.ascontiguousarray(given))

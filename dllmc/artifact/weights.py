"""The weights of programs: in shards of the artifact's own, or made of the tensors of a checkpoint that it links to.

A recipe says of which: the sources' concatenation along their first axis, in the dtype that the program wants.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dllmc.errors import ArtifactError
from dllmc.ir.program import Program

SHARD_BYTES = 4 << 30
Recipes = Mapping[str, Sequence[str]]

_FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPES = {**_FLOATS, "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL"}

_Stored = Mapping[str, tuple[list[int], str]]  # of each tensor its shape, and its dtype as safetensors spells it


def write(folder: Path, names: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Write shards and yield their names. Raises `ArtifactError` for a tensor that is missing, or has no bytes.

    Tensors are asked for one at a time, since some may be made only then; a shard is written once it is full.
    """
    shard: dict[str, torch.Tensor] = {}
    files = (f"weights-{number:05d}.safetensors" for number in count(1))
    for name in names:
        try:
            tensor = tensors[name].contiguous()
        except KeyError:
            raise ArtifactError(f"weight {name!r}: a program reads it; expected a tensor, found nothing") from None
        if tensor.is_meta:
            raise ArtifactError(
                f"weight {name!r} is on the meta device and has no bytes to write; give the model its weights, by "
                "load_state_dict(..., assign=True) for instance, and compile it again"
            )
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield _write_shard(folder / next(files), shard)
            shard = {}
        shard[name] = tensor
    yield _write_shard(folder / next(files), shard)


def link_to(out: Path, file: Path) -> str:
    """How an artifact at `out` refers to a file of a checkpoint: by the way from one to the other."""
    return Path(os.path.relpath(file.parent.resolve() / file.name, out.resolve())).as_posix()


def linked_file(folder: Path, link: str, where: str) -> Path:
    """The file of a checkpoint that an artifact links to. Raises `ArtifactError` for any other kind of file."""
    if (
        Path(link).is_absolute()
        or "\\" in link
        or os.path.normpath(link) != link
        or Path(link).suffix != ".safetensors"
    ):
        raise ArtifactError(f"{where}: linked[{link!r}]: expected a relative path to a .safetensors file")
    file = Path(os.path.normpath(folder.resolve() / link))  # whether or not the folder is there already
    if not file.is_file():
        raise ArtifactError(
            f"{where}: linked[{link!r}]: {file} is not there; keep the checkpoint where it was beside the artifact, "
            "or compile without linking weights"
        )
    return file


def check(
    where: str, own: Sequence[Path], linked: Sequence[Path], recipes: Recipes, programs: Iterable[Program]
) -> None:
    """All that programs read is stored, in their shapes and dtypes, and in the artifact's own shards nothing else.

    Only the files' headers are read. Raises `ArtifactError`.
    """
    programs = list(programs)
    held, sources = _headers(own), _headers(linked)
    named = {name for program in programs for name in program.weights}
    if unnamed := sorted((held.keys() | recipes.keys()) - named):
        raise ArtifactError(f"{where}: no program has the weights {unnamed!r:.200}")
    if twice := sorted(held.keys() & recipes.keys()):
        raise ArtifactError(f"{where}: expected a recipe or a stored tensor, found both of {twice!r:.200}")
    for program in programs:
        for name, tensor in program.weights.items():
            wanted = [dim.at(program.maxima) for dim in tensor.shape], _DTYPES[tensor.dtype]
            found = _made(where, name, recipes[name], sources, wanted[1]) if name in recipes else held.get(name)
            if found != wanted:
                raise ArtifactError(f"{where}: weight {name!r}: expected {wanted}, found {found or 'nothing'}")


def load(
    own: Iterable[Path],
    linked: Iterable[Path],
    recipes: Recipes,
    programs: Iterable[Program],
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Every weight by name: on a CPU memory-mapped, where it is stored in its dtype and in one piece.

    On another device there is never more of a weight than itself: parts are joined and cast on their way there.
    """
    programs = list(programs)
    stored = _tensors(own, {name for program in programs for name in program.weights})
    weights = {name: stored.pop(name).to(device) for name in list(stored)}
    sources = _tensors(linked, {source for recipe in recipes.values() for source in recipe})
    for program in programs:
        for name in program.weights.keys() & recipes.keys() - weights.keys():
            parts = [sources[source] for source in recipes[name]]
            dtype = getattr(torch, program.weights[name].dtype)
            weights[name] = parts[0].to(device, dtype) if len(parts) == 1 else _joined(parts, device, dtype)
    return weights


def _joined(parts: Sequence[torch.Tensor], device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """The parts' concatenation along their first axis."""
    lengths = [len(part) for part in parts]
    whole = torch.empty(sum(lengths), *parts[0].shape[1:], device=device, dtype=dtype)
    for part, place in zip(parts, whole.split(lengths), strict=True):
        place.copy_(part)
    return whole


def _write_shard(file: Path, shard: Mapping[str, torch.Tensor]) -> str:
    addresses = set[int]()
    own = {}  # safetensors takes no two names for one memory, which parameters that share their data are
    for name, tensor in shard.items():
        own[name] = tensor.clone() if tensor.data_ptr() in addresses else tensor
        addresses.add(tensor.data_ptr())
    save_file(own, file)
    return file.name


def _headers(files: Iterable[Path]) -> _Stored:
    found: dict[str, tuple[list[int], str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(key)
                    if key in found:
                        raise ArtifactError(f"{file}: another file has a tensor {key!r} too")
                    found[key] = (list(header.get_shape()), header.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: not a safetensors file: {error}") from error
    return found


def _made(where: str, name: str, recipe: Sequence[str], sources: _Stored, dtype: str) -> tuple[list[int], str]:
    """The shape and dtype that a recipe gives. Raises `ArtifactError` for one that cannot be followed."""
    if not recipe or not all(isinstance(source, str) and source in sources for source in recipe):
        raise ArtifactError(f"{where}: recipes[{name!r}]: expected tensors of the linked files, found {recipe!r:.200}")
    shapes = [sources[source][0] for source in recipe]
    dtypes = {sources[source][1] for source in recipe}
    joined = all(shapes) and len({tuple(shape[1:]) for shape in shapes}) == 1
    if not joined or (dtypes != {dtype} and not {dtype, *dtypes} <= set(_FLOATS.values())):
        raise ArtifactError(f"{where}: recipes[{name!r}]: {sorted(dtypes)} {shapes} do not make one {dtype}")
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]], dtype


def _tensors(files: Iterable[Path], wanted: Set[str]) -> dict[str, torch.Tensor]:
    """Those of the files' tensors; a checkpoint may have others, in dtypes that torch has not."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for key in wanted & set(shard.keys()):
                tensor = shard.get_tensor(key)
                # a copy where a writer put it at an address that its element type does not allow
                found[key] = tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()
    return found

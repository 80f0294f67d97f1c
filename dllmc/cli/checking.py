"""`dllmc verify`: everything that loading checks, and what there was to check."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dllmc.cli import prompts, report, terminal
from dllmc.cli.group import Command
from dllmc.cli.options import artifact_argument, json_option, no_hash_option
from dllmc.ir.graph_printer import size

if TYPE_CHECKING:
    from dllmc.artifact import Artifact


@click.command(
    cls=Command,
    epilog="\b\nExamples:\n"
    "  dllmc verify llada.dllmc\n"
    "  dllmc verify llada.dllmc --no-hash\n"
    "  dllmc verify llada.dllmc --json && dllmc generate llada.dllmc --no-hash < prompts.txt",
)
@artifact_argument
@no_hash_option
@json_option(
    "Print one JSON object: `artifact` (path), `hashed` (whether the weights' bytes were), `files`, `bytes`, "
    "`linked_files`, `weights`, `operators` and `instructions` (counts), `programs` (names), `memory_bytes`."
)
def verify(artifact: Path, no_hash: bool, as_json: bool) -> None:
    """Check an ARTIFACT as loading does: nothing of it is run, and no weight is loaded.

    File names, links, sizes and hashes; of each program the operators, the kinds and shapes of their operands, every
    view within its tensor, every buffer within the arena and whole whenever it is read; that the weights are those
    which the programs read; that an engine of this version can run it, on this machine. The exit status is 2 if
    anything is wrong, with one line that names file and field.
    """
    with terminal.progress(f"verify {artifact}"):
        import torch

        from dllmc.artifact import read
        from dllmc.runtime.device import CPU, resolve
        from dllmc.runtime.loading import require_room, require_servable

        opened = read(artifact, hash_weights=not no_hash)
        require_servable(opened)
        there = opened.device == "cpu" or torch.cuda.is_available()
        require_room(opened, resolve(None, opened.device, str(artifact)) if there else CPU)
        opened.load_trace()
    if as_json:
        click.echo(prompts.json_line(_document(opened, hashed=not no_hash)))
    else:
        report.echo(_lines(opened, hashed=not no_hash))


def _stored_bytes(opened: "Artifact") -> int:
    groups = opened.manifest["files"], opened.manifest["linked"]
    return sum(entry["bytes"] for group in groups for entry in group.values())


def _document(opened: "Artifact", hashed: bool) -> dict[str, object]:
    manifest, programs = opened.manifest, opened.programs.values()
    return {
        "artifact": str(opened.path),
        "hashed": hashed,
        "files": len(manifest["files"]),
        "bytes": _stored_bytes(opened),
        "linked_files": len(manifest["linked"]),
        "weights": len({name for program in programs for name in program.weights}),
        "operators": len(manifest["operators"]),
        "instructions": sum(len(list(program.calls())) for program in programs),
        "programs": list(opened.programs),
        "memory_bytes": dict(opened.memory),
    }


def _lines(opened: "Artifact", hashed: bool) -> Iterator[str]:
    found = _document(opened, hashed)
    links = len(opened.manifest["linked"])
    linked = f" and {report.counted(links, 'linked file')}" if links else ""
    hashes = "and sha256" if hashed else "and sha256 but for the weights'"
    yield f"files      {found['files']}{linked}, {size(_stored_bytes(opened))}: names, sizes {hashes}"
    yield f"operators  {found['operators']}, all on the allow-list and of this version"
    for name, program in opened.programs.items():
        calls = report.counted(len(list(program.calls())), "instruction")
        buffers = report.counted(len(program.buffers), "buffer")
        yield f"program    {name}: {calls} over {buffers}: operands, bounds, plan"
    yield f"weights    {found['weights']}, shapes and dtypes as the programs read them"
    yield f"memory     {size(opened.memory['total'])}, as the programs take, and as this machine has"
    yield f"{opened.path} is sound"

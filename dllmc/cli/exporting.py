"""`dllmc export`: an artifact in the form of another runtime."""

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from dllmc.cli import prompts, report, terminal
from dllmc.cli.group import Command, option
from dllmc.cli.options import artifact_argument, json_option
from dllmc.ir.graph_printer import size

OPTIONS = {"onnx": ("logits", "keep_custom_ops"), "aoti": (), "tensorrt": ("dry_run",)}
"""The formats, each with the options that it takes; their modules are `dllmc.export.NAME`."""


@click.command(
    cls=Command,
    epilog="\b\nExamples:\n"
    "  dllmc export sudoku.dllmc --format onnx --out sudoku-onnx\n"
    "  dllmc export llada.dllmc --format onnx --out llada-onnx --keep-custom-ops\n"
    "  dllmc export llada.dllmc --format aoti --out llada-aoti\n"
    "  dllmc export llada.dllmc --format tensorrt --out llada-trt --dry-run",
)
@artifact_argument
@option("Export", "--format", "form", type=click.Choice(tuple(OPTIONS)), required=True, help="What to write.")
@option(
    "Export",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Directory to write; an older export of the same format there is replaced.",
)
@option("ONNX", "--logits", is_flag=True, help="Return clean logits too, [rows, vocab] float32.")
@option(
    "ONNX",
    "--keep-custom-ops",
    is_flag=True,
    help="Leave dllmc's operators as nodes of a domain of their own, each with a function body in standard operators, "
    "for a runtime that has kernels for them.",
)
@option("TensorRT", "--dry-run", is_flag=True, help="Build no engine; say what would run where.")
@json_option("Print one JSON object: `out` (path), `format`, `files` (name: bytes), `report` (of --dry-run).")
def export(artifact: Path, form: str, out: Path, as_json: bool, **chosen: bool) -> None:
    """Write an ARTIFACT in another form: ONNX models, AOTInductor packages, or Torch-TensorRT modules.

    ONNX is data. AOTInductor packages and TensorRT modules hold native code: open only those that you made, or trust
    as you would a program.
    """
    given = {name for name, is_set in chosen.items() if is_set}
    if odd := sorted(given.difference(OPTIONS[form])):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in odd)
        raise click.UsageError(f"--format {form} does not go with {flags}", click.get_current_context())
    with terminal.progress(f"export {artifact}"):
        from dllmc.artifact import read

        arguments: dict[str, Any] = {name: chosen[name] for name in OPTIONS[form]}
        written = import_module(f"dllmc.export.{form}").export(read(artifact), out, **arguments)
    if as_json:
        found = {"out": str(out), "format": form, "files": dict(written.files), "report": written.report}
        click.echo(prompts.json_line(found))
        return
    report.echo(written.report.splitlines())
    report.echo(f"{size(count):>11}  {out / name}" for name, count in written.files.items())

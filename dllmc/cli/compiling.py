"""The commands of the compiler: compile, inspect, and passes."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dllmc.cli import pass_help, prompts, report, terminal
from dllmc.cli.group import Command, option
from dllmc.cli.options import (
    ByteSize,
    api_option,
    artifact_argument,
    diff_option,
    html_option,
    json_option,
    memory_option,
    out_argument,
)

if TYPE_CHECKING:
    from dllmc.artifact import Artifact
    from dllmc.compiler import CompileOptions
    from dllmc.ir.trace import Trace
    from dllmc.passes.base import Observer

_STAGES = "Watching the compiler"


@click.command(
    "compile",
    cls=Command,
    epilog="\b\nExamples:\n"
    "  dllmc compile examples/tiny-llada sudoku.dllmc\n"
    "  dllmc compile GSAI-ML/LLaDA-8B-Instruct llada.dllmc --dtype bfloat16\n"
    "  dllmc compile examples/tiny-llada sudoku.dllmc --memory-budget 20MiB\n"
    "  dllmc compile examples/tiny-llada --stop-after pack-tokens | less",
)
@click.argument("model", type=click.Path())
@out_argument
@api_option(
    "Size of a step",
    "max_tokens_per_step",
    int,
    "Packed tokens that a step takes at most  [default: 4096, or what the budget holds]",
)
@api_option("Size of a step", "max_requests", int, "Segments of a step at most; a guided request has two.")
@api_option(
    "Size of a step",
    "max_logit_rows",
    int,
    "Masked positions that a step predicts, and a block has, at most  [default: 1024, or what the budget holds]",
)
@option(
    "Size of a step",
    "--memory-budget",
    type=ByteSize(),
    metavar="SIZE",
    help="All that an engine may allocate, weights included, such as 20GiB. Tokens and rows then go in chunks as large "
    "as fit.",
)
@api_option("Compilation", "dtype", str, "Of weights and activations")
@api_option("Compilation", "device", str, "What it is to run on; what is for cuda can run on a CPU too")
@option(
    "Compilation",
    "--link-weights",
    is_flag=True,
    help="Refer to MODEL's own safetensors instead of copying them; the way from OUT to them must stay the same.",
)
@option("Compilation", "--passes", metavar="PIPELINE", help="Passes to run instead of those that `passes` lists.")
@option(
    "Compilation",
    "--verify",
    is_flag=True,
    help="Run the graph before and after each pass on random inputs, and the program at the end; fail where they "
    "disagree, else print each pass's largest relative error.",
)
@option(_STAGES, "--print-between-passes", "between", is_flag=True, help="Print the graph behind each pass.")
@option(_STAGES, "--time-passes", "times", is_flag=True, help="Print how long each pass and its checks took.")
@option(_STAGES, "--stop-after", metavar="PASS", help="Stop there and print the graph; write no artifact.")
@html_option("Write a page too that shows the graph pass by pass, as `inspect --html` does, with times.")
@json_option("Print what was compiled as JSON, as `inspect --json` does.")
def compile_command(
    model: str,
    out: Path | None,
    passes: str | None,
    verify: bool,
    between: bool,
    times: bool,
    stop_after: str | None,
    html: Path | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Compile MODEL into the artifact directory OUT.

    MODEL is a checkpoint folder in Hugging Face layout, or a hub id such as GSAI-ML/LLaDA-8B-Instruct. If OUT
    is an artifact already, it is replaced once the new one is complete. With --stop-after it may be left out.
    """
    context = click.get_current_context()
    if out is None and stop_after is None:
        raise click.UsageError("Missing argument 'OUT'", context)
    if as_json and (between or times or stop_after is not None):
        raise click.UsageError("--json goes with none of --print-between-passes, --time-passes, --stop-after", context)
    if html is not None and stop_after is not None:
        raise click.UsageError("--html shows an artifact, which --stop-after does not make", context)
    with terminal.progress("load torch"):
        import dllmc
        from dllmc.cli import observers, page
        from dllmc.models.checkpoint import resolve

        given = chosen if passes is None else {**chosen, "passes": passes}
        options = dllmc.CompileOptions(**given, verify="numeric" if verify else "none")
    log = observers.Log()
    watching = [log, *([observers.PrintBetween()] if between else [])]

    def tables(trace: "Trace") -> Iterator[str]:
        yield from report.time_lines(trace, log.entries) if times else ()
        yield from report.error_lines(trace) if verify else ()

    folder = resolve(model)  # outside of any bar: a download shows its own
    if stop_after is not None:
        report.echo(tables(_stopped(folder, options, stop_after, watching)))
        return
    assert out is not None
    with prompts.replacing(html) if html is not None else nullcontext() as stream:
        with terminal.progress("compile", quiet=between) as show:
            artifact = dllmc.compile(folder, out, options, on_stage=show, observers=watching)
        trace = report.traced(artifact)
        if stream is not None:
            stream.write(page.render(artifact, trace, log.entries))
    if as_json:
        click.echo(prompts.json_line(report.document(artifact)))
        return
    report.echo((*report.pass_lines(artifact), *tables(trace), *report.memory_lines(artifact)))
    report.echo(f"wrote {path}" for path in (html, out) if path is not None)


@click.command(
    cls=Command,
    epilog="\b\nExamples:\n"
    "  dllmc inspect sudoku.dllmc\n"
    "  dllmc inspect sudoku.dllmc --html sudoku.html\n"
    "  dllmc inspect sudoku.dllmc --memory memory.html\n"
    "  dllmc inspect sudoku.dllmc --graph --after pack-tokens\n"
    "  dllmc inspect --diff older.dllmc newer.dllmc\n"
    "  dllmc inspect sudoku.dllmc --json | jq .memory_bytes",
)
@artifact_argument
@option("Graph", "--graph", "show_graph", is_flag=True, help="Add the graph that the program was made from.")
@option("Graph", "--after", metavar="PASS", help="Add the graph behind that pass, or behind `capture`.")
@option("Graph", "--all-layers", is_flag=True, help="Show layers too that do what an earlier one does.")
@option("Output", "--program", "show_program", is_flag=True, help="Add all instructions and the buffers' offsets.")
@html_option("Write a page instead that shows the graph pass by pass; it needs no network. An older file is replaced.")
@memory_option
@diff_option
@json_option(
    "Print one JSON object: `artifact` (path), `schema`, `versions`, `model`, `options`, `programs` (each `name`, "
    "`instructions`, `buffers`, `maxima`, `arena_bytes`, `lower_bound_bytes`, and with --program the `program` as it "
    "is stored), `passes` (each `pass`, `modified` and its counts), `trace` (null where the artifact has none; of each "
    "pass `pass`, `error` (null unless verified), `notes`, `calls_before`, `calls_after`, `written_bytes`), "
    "`memory_bytes` (`weights`, `arena`, `kv_pool`, `state`, `total`), and with --graph `graph`, a list of calls, each "
    "`name`, `operator`, `arguments`, `type`, `size_bytes`, `is_view`, `layer`, `source`. "
    "With --diff: `old`, `new` (paths), `changes` (each `what`, `old`, `new`)."
)
def inspect(
    artifact: Path,
    show_graph: bool,
    after: str | None,
    all_layers: bool,
    show_program: bool,
    html: Path | None,
    memory: Path | None,
    diff: Path | None,
    as_json: bool,
) -> None:
    """Show the model, programs, passes and memory of an ARTIFACT, and what each pass did."""
    from dllmc.artifact import read
    from dllmc.cli import page, picture
    from dllmc.ir import graph_printer
    from dllmc.ir.printer import text_of

    opened = read(artifact)
    if diff is not None:
        _compare(read(diff), opened, show_program, as_json)
        return
    graph = report.traced(opened).after(after) if show_graph or after is not None else None
    if html is not None:
        with prompts.replacing(html) as stream:
            stream.write(page.render(opened, report.traced(opened)))
    if memory is not None:
        picture.write(opened, memory)
    if as_json:
        click.echo(prompts.json_line(report.document(opened, with_programs=show_program, graph=graph)))
        return
    if html is not None or memory is not None:
        report.echo(f"wrote {path}" for path in (html, memory) if path is not None)
        return
    report.echo((*report.model_lines(opened), *report.pass_lines(opened), *report.memory_lines(opened)))
    if graph is not None:
        report.echo(("", *graph_printer.text_of(graph, all_layers).splitlines()))
    if show_program:
        for program in opened.programs.values():
            click.echo(text_of(program))


@click.command(
    cls=Command,
    epilog="\b\nExamples:\n  dllmc passes\n  dllmc passes select-logit-rows\n  dllmc passes --json | jq -r '.[].name'",
)
@click.argument("name", metavar="[PASS]", required=False)
@json_option(
    "Print a JSON list, or the one object of PASS: `name`, `summary`, `description`, `requires` and `ensures` (facts), "
    "`options` (each `name`, `type`, `default`)."
)
def passes(name: str | None, as_json: bool) -> None:
    """List the passes in the order of the default pipeline, or describe one PASS in full.

    A pipeline, as `compile --passes` takes it, is text such as 'cse,fuse-head,lower': passes in the order in which
    they run, options in braces, name{option=value}. A pass requires facts that passes before it ensure.
    """
    found = pass_help.known() if name is None else [pass_help.described(name)]
    if as_json:
        click.echo(prompts.json_line([vars(p) for p in found] if name is None else vars(found[0])))
    elif name is None:
        report.echo(line for p in found for line in pass_help.lines(p))
    else:
        report.echo(pass_help.full_lines(found[0]))


def _compare(old: "Artifact", new: "Artifact", with_programs: bool, as_json: bool) -> None:
    from dllmc.cli import differences

    found = differences.changes(old, new)
    if as_json:
        changes = [vars(change) for change in found]
        click.echo(prompts.json_line({"old": str(old.path), "new": str(new.path), "changes": changes}))
        return
    report.echo(differences.lines(found))
    if with_programs:
        report.echo(differences.program_lines(old, new))


def _stopped(folder: Path, options: "CompileOptions", last: str, observers: "list[Observer]") -> "Trace":
    """Run the passes until `last`, and print what there is then: the program if it is lowered, else the graph."""
    import torch

    from dllmc.compiler import rewrite
    from dllmc.ir import graph_printer, printer
    from dllmc.models import checkpoint
    from dllmc.passes import pipeline

    shorter = replace(options, passes=pipeline.up_to(options.pipeline, last))
    printed = len(observers) > 1
    with terminal.progress("compile", quiet=printed):
        model = checkpoint.load_model(folder, dtype=getattr(torch, options.dtype))
        step, trace = rewrite(model, checkpoint.load_spec(folder), shorter, *observers)
    if step.program is not None:
        report.echo(printer.text_of(step.program).splitlines())
    elif not printed:
        report.echo(graph_printer.text_of(trace.after()).splitlines())
    return trace

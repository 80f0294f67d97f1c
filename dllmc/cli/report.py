"""An artifact as text for people and as a document for tools. Sizes in documents are bytes."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from dllmc.cli import terminal
from dllmc.errors import ArtifactError
from dllmc.ir.graph_printer import COMMENT, size
from dllmc.ir.trace import Graph, Trace, calls, written_bytes

if TYPE_CHECKING:
    from dllmc.artifact import Artifact
    from dllmc.ir.program import Program
    from dllmc.passes.base import LogEntry


BLOCK = 32  # as many masked positions as a request has by default


def echo(lines: Iterable[str]) -> None:
    """Print lines; on a terminal the user's source behind a call is dimmed."""
    dims = terminal.takes_colour(sys.stdout)
    for line in lines:
        code, mark, source = line.partition(COMMENT)
        click.echo(code + click.style(mark + source, dim=True) if dims and mark else line)


def model_lines(artifact: "Artifact") -> Iterator[str]:
    """The model, and one line a program: how large it is and how large a step may be."""
    spec = artifact.spec
    shift = ", row i - 1 predicts position i" if spec.shifted else ""
    yield (
        f"model    vocabulary {spec.vocab_size}, mask {spec.mask_id}, ends {list(spec.end_ids)}, "
        f"up to {spec.max_positions} positions{shift}"
    )
    for name, program in artifact.programs.items():
        limits = ", ".join(f"{value} {symbol}" for symbol, value in program.maxima.items())
        yield f"program  {name}: {len(list(program.calls()))} instructions, {len(program.buffers)} buffers; {limits}"


def pass_lines(artifact: "Artifact") -> Iterator[str]:
    """One line a pass: what it counted, or that it found nothing to do."""
    for entry in artifact.manifest["passes"]:
        stats = {key: value for key, value in entry.items() if key not in ("pass", "modified")}
        yield f"pass     {entry['pass']:<20}{counts(stats) or 'nothing to do'}"


def counts(stats: Mapping[str, int]) -> str:
    """What a pass counted, zeros left out."""
    return ", ".join(
        f"{key.removesuffix('_bytes').replace('_', ' ')} {size(value) if key.endswith('_bytes') else value}"
        for key, value in stats.items()
        if value
    )


def time_lines(trace: Trace, log: "Sequence[LogEntry]") -> Iterator[str]:
    """A table: seconds of each pass and of the checks behind it, its share of all, calls before and after."""
    seconds, checks = sum(entry.seconds for entry in log), sum(entry.check_seconds for entry in log)
    yield f"time     {'pass':<20}{'pass s':>8}{'checks s':>10}{'share':>8}  calls"
    for index, entry in enumerate(log):
        share = (entry.seconds + entry.check_seconds) / (seconds + checks)
        before, after = calls(trace.before(index)), calls(trace.graphs[trace.passes[index].graph])
        change = f"{before} -> {after}" if entry.modified else f"{after}, not modified"
        yield f"time     {entry.text:<20}{entry.seconds:>8.3f}{entry.check_seconds:>10.3f}{share:>8.1%}  {change}"
    yield f"time     {'all':<20}{seconds:>8.3f}{checks:>10.3f}{1:>8.1%}"


def error_lines(trace: Trace) -> Iterator[str]:
    """The largest relative error that the numeric check found of each pass it looked at."""
    for entry in trace.passes:
        if entry.error is not None:
            yield f"verify   {entry.text:<20}largest relative error {entry.error:.2g}"


def memory_lines(artifact: "Artifact") -> Iterator[str]:
    """The equation weights + arena + kv_pool + state = total, what it buys, and how good each program's plan is."""
    memory = artifact.memory
    parts = " + ".join(f"{name} {size(memory[name])}" for name in ("weights", "arena", "kv_pool", "state"))
    yield f"memory   {parts} = {size(memory['total'])}"
    budget = artifact.manifest["options"].get("memory_budget")
    if budget is not None:
        yield f"budget   {size(budget)}, of which {size(budget - memory['total'])} are left"
    yield f"buys     {capacity(artifact, artifact.program)}"
    for program in artifact.programs.values():
        taken = f"{size(program.arena_bytes or 0)} for {len(program.buffers)} buffers"
        yield f"arena    {program.name}: {taken}, {quality(program)}"


def quality(program: "Program") -> str:
    """How good a plan is: optimal, or how far above the lower bound, which is what is live at once."""
    arena, bound = program.arena_bytes or 0, program.lower_bound_bytes or 0
    if arena <= bound:
        return "optimal"
    return f"{size(arena - bound)} ({arena / max(bound, 1) - 1:.1%}) above the lower bound of {size(bound)}"


def capacity(artifact: "Artifact", program: "Program") -> str:
    """How long a request may be, and how many of some lengths a step takes together."""
    limits = program.maxima
    longest = min(limits["tokens"], artifact.spec.max_positions)
    most = min(limits["segments"], limits["rows"] // BLOCK)
    counts = {n: min(limits["tokens"] // n, most) for n in (longest, longest // 4, longest // 16) if n}
    together = " or ".join(f"{count} of {length}" for length, count in counts.items() if count > 1)
    at_once = f", at once {together} tokens in blocks of {BLOCK}" if together else ""
    return f"requests of up to {longest} tokens{at_once}"


def traced(artifact: "Artifact") -> Trace:
    """The artifact's trace. Raises `ArtifactError` where it has none."""
    trace = artifact.load_trace()
    if trace is None:
        raise ArtifactError(f"{artifact.path}: it has no trace.json to show graphs from; compile the model again")
    return trace


def document(artifact: "Artifact", with_programs: bool = False, graph: Graph | None = None) -> dict[str, Any]:
    """What the lines say, under stable names, for JSON. `with_programs`: each program in full, as it is stored."""
    from dllmc.ir.program_json import to_json

    programs = [
        {
            "name": name,
            "instructions": len(list(program.calls())),
            "buffers": len(program.buffers),
            "maxima": dict(program.maxima),
            "arena_bytes": program.arena_bytes,
            "lower_bound_bytes": program.lower_bound_bytes,
        }
        | ({"program": to_json(program)} if with_programs else {})
        for name, program in artifact.programs.items()
    ]
    manifest = artifact.manifest
    return {
        "artifact": str(artifact.path),
        **{name: manifest[name] for name in ("schema", "versions", "model", "options")},
        "programs": programs,
        "passes": manifest["passes"],
        "trace": None if (trace := artifact.load_trace()) is None else _trace_document(trace),
        "memory_bytes": dict(artifact.memory),
        **({} if graph is None else {"graph": [vars(call) for call in graph]}),
    }


def _trace_document(trace: Trace) -> list[dict[str, Any]]:
    return [
        {
            "pass": entry.text,
            "error": entry.error,
            "notes": list(entry.notes),
            "calls_before": calls(trace.before(index)),
            "calls_after": calls(trace.graphs[entry.graph]),
            "written_bytes": written_bytes(trace.graphs[entry.graph]),
        }
        for index, entry in enumerate(trace.passes)
    ]


def table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Rows under their names: the first column to the left, the others to the right."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        yield "  ".join(
            (first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True)))
        ).rstrip()


def counted(count: int, noun: str) -> str:
    """1 token, 2 tokens, 2 passes."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"

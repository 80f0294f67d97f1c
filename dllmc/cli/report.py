"""An artifact as text for people and as a document for tools. Sizes in documents are bytes."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllmc.artifact import Artifact
    from dllmc.evaluate import Report


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
        yield f"program  {name}: {len(program.instructions)} instructions, {len(program.buffers)} buffers; {limits}"


def pass_lines(artifact: "Artifact") -> Iterator[str]:
    """One line a pass: what it counted, or that it found nothing to do."""
    for entry in artifact.manifest["passes"]:
        counts = {key: value for key, value in entry.items() if key not in ("pass", "modified") and value}
        shown = [
            f"{key.removesuffix('_bytes').replace('_', ' ')} {size(value) if key.endswith('_bytes') else value}"
            for key, value in counts.items()
        ]
        yield f"pass     {entry['pass']:<20}{', '.join(shown) or 'nothing to do'}"


def memory_lines(artifact: "Artifact") -> Iterator[str]:
    """The equation weights + arena + kv_pool + state = total, and how good each program's plan is."""
    memory = artifact.memory
    parts = " + ".join(f"{name} {size(memory[name])}" for name in ("weights", "arena", "kv_pool", "state"))
    yield f"memory   {parts} = {size(memory['total'])}"
    for program in artifact.programs.values():
        bound = program.lower_bound_bytes or 0
        gap = "optimal" if program.arena_bytes == bound else f"at least {size(bound)} are live at once"
        yield f"arena    {program.name}: {size(program.arena_bytes or 0)} for {len(program.buffers)} buffers, {gap}"


def document(artifact: "Artifact", with_programs: bool = False) -> dict[str, Any]:
    """What the lines say, under stable names, for JSON. `with_programs`: each program in full, as it is stored."""
    from dllmc.ir.program_json import to_json

    programs = [
        {
            "name": name,
            "instructions": len(program.instructions),
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
        "memory_bytes": dict(artifact.memory),
    }


def evaluation_lines(measured: "Report") -> Iterator[str]:
    """What an evaluation measured, in shares, nats and tokens a second."""
    low, high = measured.interval
    unit = "missing tokens" if measured.nll is not None else "answers"
    yield f"task      {measured.task}, {counted(measured.examples, 'example')}"
    yield f"accuracy  {measured.accuracy:.1%} of {unit} right (95% interval {low:.1%} to {high:.1%})"
    if measured.nll is not None and measured.nll_interval is not None:
        low, high = measured.nll_interval
        interval = f"(95% interval {low:.3f} to {high:.3f})"
        yield f"NLL       {measured.nll:.3f} nats a missing token, teacher-forced {interval}"
    each = measured.forward_passes / measured.examples
    yield f"passes    {counted(measured.forward_passes, 'forward pass')}, {each:.1f} an example"
    yield f"speed     {measured.tokens_per_second:.0f} tokens/s ({measured.tokens} in {measured.seconds:.2f} s)"


def evaluation(measured: "Report") -> dict[str, Any]:
    """The same as a document for JSON."""
    return {**asdict(measured), "tokens_per_second": measured.tokens_per_second}


def counted(count: int, noun: str) -> str:
    """1 token, 2 tokens, 2 passes."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def size(count: int) -> str:
    """Bytes for people: 1536 -> 1.5 KiB."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"

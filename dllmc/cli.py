"""The command line: parse, call the API, print. Nothing is imported before a command needs it."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dllmc.errors import DllmcError

if TYPE_CHECKING:
    from dllmc.artifact import Artifact

F = TypeVar("F", bound=Callable[..., None])

DEFAULTS = {  # of CompileOptions and SamplingParams; a test holds them equal, so that --help needs no torch
    "max_tokens_per_step": 4096,
    "max_requests": 64,
    "max_logit_rows": 1024,
    "dtype": "float32",
    "gen_length": 128,
    "block_length": 32,
    "temperature": 0.0,
    "remasking": "low_confidence",
    "schedule": "uniform",
    "cfg_scale": 0.0,
    "seed": 0,
}


def option(name: str, kind: Any, text: str) -> Callable[[F], F]:
    """An option whose default is that of the API."""
    default = DEFAULTS.get(name)
    flag = f"--{name.replace('_', '-')}"
    return click.option(flag, name, type=kind, default=default, show_default=default is not None, help=text)


def token_ids(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Parse `1,2,3`."""
    try:
        return tuple(int(part) for part in value.replace(",", " ").split()) if value else ()
    except ValueError:
        raise click.BadParameter(f"expected token ids such as 12,7,300, found {value!r}") from None


def reported(command: F) -> F:
    """Print dllmc's own errors in one piece and exit with code 2; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except DllmcError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)

    return wrapper  # type: ignore[return-value]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dllmc")
def main() -> None:
    """Compile diffusion language models into memory-planned programs, and run them."""


@main.command("compile")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@option("max_tokens_per_step", int, "Packed tokens that a step takes at most.")
@option("max_requests", int, "Segments that a step takes at most; a guided request has two.")
@option("max_logit_rows", int, "Masked positions that a step predicts at most; no block may be longer.")
@option("dtype", str, "float32, bfloat16 or float16.")
@click.option("--passes", help="Pipeline text instead of the default one.")
@reported
def compile_command(model: str, out: Path, passes: str | None, **chosen: Any) -> None:
    """Compile MODEL into the artifact directory OUT.

    MODEL is a checkpoint folder in Hugging Face layout, or a hub id such as GSAI-ML/LLaDA-8B-Instruct.
    """
    import dllmc

    options = dllmc.CompileOptions(**chosen if passes is None else {**chosen, "passes": passes})
    artifact = dllmc.compile(model, out, options)
    print_passes(artifact)
    print_memory(artifact)
    click.echo(f"wrote {out}")


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", "texts", multiple=True, help="A prompt as text; may be repeated.")
@click.option("--prompt-ids", "ids", multiple=True, help="A prompt as token ids, 12,7,300; may be repeated.")
@option("gen_length", int, "Tokens to generate.")
@option("block_length", int, "Tokens denoised together.")
@option("steps", int, "Forward passes over all blocks; default: one token a pass.")
@option("threshold", float, "Commit every token at least this confident, and the best one.")
@option("temperature", float, "0 takes the best token.")
@option("top_k", int, "Sample from the best K tokens only (at most 1024).")
@option("top_p", float, "Sample from the fewest best tokens of this probability.")
@option("remasking", str, "Confidence: low_confidence, topk_margin, entropy or random.")
@option("schedule", str, "How steps share a block: uniform or timestep.")
@option("cfg_scale", float, "Classifier-free guidance; 0 is off.")
@option("seed", int, "Key of the sampling noise.")
@click.option("--ignore-eos", is_flag=True, help="Do not stop at the model's end tokens.")
@click.option("--stop-token-ids", callback=token_ids, help="More token ids that end a completion.")
@click.option("--suppress-tokens", callback=token_ids, help="Token ids that are never chosen.")
@click.option("--defer-tokens", callback=token_ids, help="Token ids that are committed last.")
@reported
def generate(artifact: Path, texts: tuple[str, ...], ids: tuple[str, ...], **sampling: Any) -> None:
    r"""Decode prompts with a compiled ARTIFACT.

    All prompts are decoded together, in shared steps. In --prompt, \n is a newline. Completions go to standard
    output, one after the other; what each cost goes to standard error.
    """
    import dllmc

    prompts: list[str | tuple[int, ...]] = [text.replace("\\n", "\n") for text in texts]
    context = click.get_current_context()
    prompts += [token_ids(context, context.command.params[0], text) for text in ids]
    if not prompts:
        raise click.UsageError("give at least one --prompt or --prompt-ids")
    params = dllmc.SamplingParams(**sampling)
    engine = dllmc.load(artifact)
    for result in engine.generate(prompts, params):
        click.echo(result.text if result.text is not None else ",".join(map(str, result.token_ids)))
        cost = counted(len(result.token_ids), "token"), counted(result.forward_passes, "forward pass")
        click.echo(f"[{', '.join((*cost, result.finish_reason))}]", err=True)


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--program", "show_program", is_flag=True, help="Print the instructions and the buffers' offsets.")
@reported
def inspect(artifact: Path, show_program: bool) -> None:
    """Show the model, programs, passes and memory of an ARTIFACT."""
    from dllmc.artifact import read
    from dllmc.ir.printer import text_of

    opened = read(artifact)
    spec = opened.spec
    shift = ", row i - 1 predicts position i" if spec.shifted else ""
    click.echo(
        f"model    vocabulary {spec.vocab_size}, mask {spec.mask_id}, ends {list(spec.end_ids)}, "
        f"up to {spec.max_positions} positions{shift}"
    )
    for name, program in opened.programs.items():
        limits = ", ".join(f"{value} {symbol}" for symbol, value in program.maxima.items())
        click.echo(
            f"program  {name}: {len(program.instructions)} instructions, {len(program.buffers)} buffers; {limits}"
        )
    print_passes(opened)
    print_memory(opened)
    if show_program:
        for program in opened.programs.values():
            click.echo(text_of(program))


def print_passes(artifact: "Artifact") -> None:
    """One line a pass: what it counted, or that it found nothing to do."""
    for entry in artifact.manifest["passes"]:
        counts = {key: value for key, value in entry.items() if key not in ("pass", "modified") and value}
        shown = [
            f"{key.removesuffix('_bytes').replace('_', ' ')} {size(value) if key.endswith('_bytes') else value}"
            for key, value in counts.items()
        ]
        click.echo(f"pass     {entry['pass']:<20}{', '.join(shown) or 'nothing to do'}")


def print_memory(artifact: "Artifact") -> None:
    """The equation weights + arena + kv_pool + state = total, and how good each program's plan is."""
    memory = artifact.memory
    parts = " + ".join(f"{name} {size(memory[name])}" for name in ("weights", "arena", "kv_pool", "state"))
    click.echo(f"memory   {parts} = {size(memory['total'])}")
    for program in artifact.programs.values():
        bound = program.lower_bound_bytes or 0
        gap = "optimal" if program.arena_bytes == bound else f"at least {size(bound)} are live at once"
        click.echo(
            f"arena    {program.name}: {size(program.arena_bytes or 0)} for {len(program.buffers)} buffers, {gap}"
        )


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

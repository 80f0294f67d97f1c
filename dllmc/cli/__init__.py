"""The command line: parse, call the API, print. Nothing is imported before a command needs it."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dllmc.cli import checking, compiling, evaluating, exporting, prompts, report, terminal
from dllmc.cli.group import Group, option
from dllmc.cli.options import (
    artifact_argument,
    cache_options,
    device_option,
    json_option,
    no_hash_option,
    sampling_options,
    threads_option,
    token_ids,
)
from dllmc.errors import RequestError

if TYPE_CHECKING:
    from dllmc.runtime.engine import Engine
    from dllmc.runtime.params import CachePolicy, SamplingParams
    from dllmc.runtime.request import GenerationResult


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
    epilog="\b\nA first session:\n"
    "  dllmc compile examples/tiny-llada sudoku.dllmc\n"
    "  dllmc generate sudoku.dllmc --watch --prompt 'sudoku:\\n1040\\n3401\\n0004\\n4012\\n'\n"
    "  dllmc inspect sudoku.dllmc",
)
@click.version_option(package_name="dllmc")
@click.pass_context
def main(context: click.Context) -> None:
    """Compile diffusion language models into memory-planned programs, and run them."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    compiling.compile_command,
    compiling.inspect,
    compiling.passes,
    checking.verify,
    exporting.export,
    evaluating.eval_command,
):
    main.add_command(command)


@main.command(
    epilog="\b\nExamples:\n"
    "  dllmc generate sudoku.dllmc --prompt 'sudoku:\\n1040\\n3401\\n0004\\n4012\\n' --watch\n"
    "  dllmc generate llada.dllmc --chat --prompt 'Why is the sky blue?' --threshold 0.9\n"
    "  dllmc generate llada.dllmc --file questions.jsonl --chat --out answers.jsonl\n"
    "  dllmc generate llada.dllmc --json < prompts.txt | jq .output",
)
@artifact_argument
@option("Prompts", "--prompt", "texts", multiple=True, help=r"A prompt as text, \n for a newline; may be repeated.")
@option(
    "Prompts",
    "--prompt-ids",
    "ids",
    type=token_ids,
    metavar="IDS",
    multiple=True,
    help="A prompt as token ids, 12,7,300.",
)
@option(
    "Prompts",
    "--file",
    type=click.Path(allow_dash=True),
    help="Prompts from a file: FILE.jsonl has an object a line with `input` (text, as it is) or `token_ids`; "
    r"any other file is text with one prompt a line, \n for a newline. - is standard input, as text.",
)
@option("Prompts", "--chat", is_flag=True, help="Each prompt is a user's message; apply the model's chat template.")
@sampling_options
@cache_options
@device_option
@threads_option
@no_hash_option
@option(
    "Output",
    "--watch",
    is_flag=True,
    help="Show the blocks unmasking, on standard error: live, coloured by confidence (NO_COLOR is respected) and "
    "slowed to 17 steps a second at most; without a terminal, one plain line a step and prompt.",
)
@option(
    "Output",
    "--stats",
    is_flag=True,
    help="Show what the engine does, on standard error: requests in line and running, tokens a second, milliseconds of "
    "each phase's steps, pages of the KV pool; live in a terminal, and a last line.",
)
@json_option(
    "Print a JSON object a line and prompt: `input` (text or token ids), `output` (text, null without a "
    "tokenizer), `token_ids`, `forward_passes`, `finish_reason` (stop or length)."
)
@option(
    "Output",
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Write the objects of --json to a file instead of printing completions. It is written when all are done; "
    "an older file is replaced.",
)
def generate(
    artifact: Path,
    texts: tuple[str, ...],
    ids: tuple[tuple[int, ...], ...],
    file: str | None,
    chat: bool,
    device: str | None,
    threads: int | str,
    no_hash: bool,
    watch: bool,
    stats: bool,
    as_json: bool,
    out: Path | None,
    cache: Mapping[str, Any],
    **sampling: Any,
) -> None:
    r"""Decode prompts with a compiled ARTIFACT.

    All prompts are decoded together, in shared steps: those of --prompt, of --prompt-ids and of --file, or the lines
    of standard input where none is given. Completions go to standard output, one after the other; what each cost goes
    to standard error.
    """
    given = prompts.collect(texts, ids, file)
    import dllmc

    params, policy = dllmc.SamplingParams(**sampling, logprobs=watch), dllmc.CachePolicy(**cache)
    with prompts.replacing(out) if out is not None else nullcontext() as stream:
        with terminal.progress(f"load {artifact}"):
            engine = dllmc.load(artifact, device, hash_weights=not no_hash, threads=threads)
        results = _decode(engine, given, chat, params, policy, watch, stats)
        records = [prompts.json_line(prompts.record(g, r)) for g, r in zip(given, results, strict=True)]
        if stream is not None:
            stream.writelines(f"{record}\n" for record in records)
    if as_json:
        click.echo("\n".join(records))
    elif out is None:
        _print_results(results, engine, watch)
    if out is not None:
        click.echo(f"wrote {report.counted(len(results), 'completion')} to {out}", err=True)


@main.command(
    short_help="Print the script that sets up completion at the Tab key.",
    epilog="\b\nTo have it in every new shell:\n"
    "  bash  echo 'eval \"$(dllmc completion bash)\"' >> ~/.bashrc\n"
    "  zsh   echo 'eval \"$(dllmc completion zsh)\"' >> ~/.zshrc\n"
    "  fish  dllmc completion fish > ~/.config/fish/completions/dllmc.fish",
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete commands, options, their values and files at the Tab key."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "dllmc", "_DLLMC_COMPLETE").source())


def _decode(
    engine: "Engine",
    given: list[prompts.Given],
    chat: bool,
    params: "SamplingParams",
    policy: "CachePolicy",
    watch: bool,
    stats: bool,
) -> "list[GenerationResult]":
    """Decode with whatever views of it are wanted. Errors say where the prompt they are about was given."""
    from dllmc.cli.stats import stats_line
    from dllmc.cli.watch import bar, view

    contents = [_rendered(engine, prompt) if chat else prompt.content for prompt in given]
    work = len(given), params.gen_length
    try:
        with ExitStack() as views:
            on_step = views.enter_context(view(*work, engine.tokenizer)) if watch else None
            if stats:
                on_step = views.enter_context(stats_line(engine, on_step))
            return engine.generate(contents, params, policy, on_step or views.enter_context(bar(*work)))
    except RequestError as error:
        raise prompts.located(error, given) from error


def _rendered(engine: "Engine", prompt: prompts.Given) -> str:
    if not isinstance(prompt.content, str):
        raise RequestError(f"{prompt.where}: --chat takes text, found token ids; give the message, or leave out --chat")
    if engine.tokenizer is None:
        raise RequestError("--chat: the artifact has no tokenizer; give token ids with --prompt-ids, without --chat")
    try:
        return engine.tokenizer.render_chat(prompt.content)
    except RequestError as error:
        raise RequestError(f"--chat: {error}") from error


def _print_results(results: "list[GenerationResult]", engine: "Engine", watched: bool) -> None:
    from dllmc.cli.watch import coloured

    for result in results:
        plain = result.text if result.text is not None else ",".join(map(str, result.token_ids))
        click.echo(coloured(result, engine.tokenizer) if watched and terminal.takes_colour(sys.stdout) else plain)
        cost = report.counted(len(result.token_ids), "token"), report.counted(result.forward_passes, "forward pass")
        click.echo(f"[{', '.join((*cost, result.finish_reason))}]", err=True)

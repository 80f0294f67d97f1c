"""Options and arguments that commands share, with the API's defaults; nothing here loads torch or numpy."""

import re
from collections.abc import Callable, Collection, Mapping
from decimal import Decimal
from functools import wraps
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import click

from dllmc.cli.group import F, option

DEFAULTS = {  # of CompileOptions and SamplingParams; a test holds them equal
    "max_requests": 64,
    "dtype": "float32",
    "device": "cpu",
    "gen_length": 128,
    "block_length": 32,
    "temperature": 0.0,
    "remasking": "low_confidence",
    "schedule": "uniform",
    "cfg_scale": 0.0,
    "seed": 0,
}
CHOICES = {  # likewise
    "dtype": ("float32", "bfloat16", "float16"),
    "device": ("cpu", "cuda"),
    "remasking": ("low_confidence", "topk_margin", "entropy", "random"),
    "schedule": ("uniform", "timestep"),
    "mode": ("block", "none"),
    "selection": ("per_head", "shared"),
}


def token_ids(text: str) -> tuple[int, ...]:
    """Parse `1,2,3`, with commas or spaces."""
    try:
        return tuple(int(part) for part in text.replace(",", " ").split()) if text else ()
    except ValueError:
        raise click.BadParameter(f"expected token ids such as 12,7,300, found {text!r}") from None


_UNITS = {"": 1, "B": 1, **{f"{p}{i}B": b**n for b, i in ((1000, ""), (1024, "i")) for n, p in enumerate("KMGT", 1)}}


_METAVARS = {int: "N", float: "X"}
_CACHE_FIELDS: dict[str, tuple[type, str]] = {
    "retention": (float, "Share of the tokens outside of the block that are cached; default: 1, all."),
    "selection": (str, "Each head keeps tokens of its own, the default, or all keep the same"),
    "pool": (int, "Neighbours over which a token's score is max-pooled, odd; default: 3."),
    "delay": (int, "Passes of a block before its Refresh; default: 0."),
    "refresh_interval": (int, "Passes from one Refresh of a block to the next; default: one Refresh a block."),
}


class ByteSize(click.ParamType[int]):
    """Bytes, as 20GiB, 512MiB, 1.5GB or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes, rounded down."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
        units = {unit.lower(): factor for unit, factor in _UNITS.items()}
        if match is None or match[2].lower() not in units:
            self.fail(f"expected a size such as 20GiB, 512MiB or 1500000000, found {value!r}", param, ctx)
        return int(Decimal(match[1]) * units[match[2].lower()])


class Listed(click.ParamType[tuple[Any, ...]]):
    """Values of another type, with commas."""

    def __init__(self, each: click.ParamType[Any]) -> None:
        self.name, self.each = f"{each.name} list", each

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        return tuple(self.each.convert(part.strip(), param, ctx) for part in value.split(","))


def api_option(heading: str, name: str, kind: Any, text: str, listed: bool = False) -> Callable[[F], F]:
    """An option that is a field of the API's, with its default and choices; `listed`: several, with commas."""
    attributes: dict[str, Any] = {"type": kind, "metavar": _METAVARS.get(kind), "help": text}
    if name in CHOICES:
        attributes |= {"type": click.Choice(CHOICES[name]), "metavar": "NAME"}
        attributes["help"] = f"{text}: {', '.join(CHOICES[name])}."
    if name in DEFAULTS:
        attributes |= {"default": DEFAULTS[name], "show_default": True}
    if listed:
        each = click.types.convert_type(attributes["type"])
        attributes |= {"type": Listed(each), "metavar": f"{attributes['metavar']},..."}
    return option(heading, f"--{name.replace('_', '-')}", name, **attributes)


def json_option(text: str) -> Callable[[F], F]:
    """--json, which is documented field by field: `text` names them."""
    return option("Output", "--json", "as_json", is_flag=True, help=text)


def html_option(text: str) -> Callable[[F], F]:
    """--html FILE."""
    return option("Output", "--html", type=click.Path(path_type=Path), metavar="FILE", help=text)


def drawing_option(name: str, suffixes: Mapping[str, str | None], text: str) -> Callable[[F], F]:
    """An option that names a picture to draw, refused at once if it is none of these, or if nothing can draw it.

    suffixes: of a file, and what to do instead of installing matplotlib; None where it takes none.
    """

    def check(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is None:
            return None
        names = [f"FILE{suffix}" for suffix in suffixes]
        if path.suffix.lower() not in suffixes:
            raise click.BadParameter(f"{path} is no picture; give a {', '.join(names[:-1])} or {names[-1]}", context)
        instead = suffixes[path.suffix.lower()]
        if instead is not None and find_spec("matplotlib") is None:
            raise click.ClickException(
                f"{path}: images are drawn by matplotlib, which is not installed; "
                f"install it (`pip install matplotlib`, or dllmc with its extra `plot`){instead}"
            )
        return path

    kind = click.Path(path_type=Path)
    return option("Output", name, type=kind, callback=check, metavar="FILE", help=text)


memory_option: Callable[[F], F] = drawing_option(
    "--memory",
    {".html": None, ".png": ", or give a FILE.html"},
    "Draw where the memory of a step goes instead, before and after planning: FILE.html (it needs no network "
    "and names what one points at) or FILE.png (it needs matplotlib). An older file is replaced.",
)
plot_option: Callable[[F], F] = drawing_option(
    "--plot",
    dict.fromkeys((".png", ".svg", ".pdf"), ""),
    "Draw the scores of several policies over retention: FILE.png, FILE.svg or FILE.pdf (it needs matplotlib). "
    "An older file is replaced.",
)


def sampling_options(command: F) -> F:
    """The options that are fields of SamplingParams, `logprobs` left out."""
    options: tuple[Callable[[F], F], ...] = (
        api_option("Decoding", "gen_length", int, "Tokens to generate."),
        api_option("Decoding", "block_length", int, "Tokens denoised together."),
        api_option("Decoding", "steps", int, "Forward passes over all blocks; default: one token a pass."),
        api_option("Decoding", "threshold", float, "Commit every token at least this confident, and the best one."),
        api_option("Decoding", "schedule", str, "How --steps share a block"),
        api_option("Decoding", "remasking", str, "What ranks the tokens of a step"),
        api_option("Decoding", "cfg_scale", float, "Classifier-free guidance; 0 is off."),
        api_option("Sampling", "temperature", float, "0 takes the best token."),
        api_option("Sampling", "top_k", int, "Sample from the best K tokens only (at most 1024)."),
        api_option("Sampling", "top_p", float, "Sample from the fewest best tokens of this probability."),
        api_option("Sampling", "seed", int, "Key of the sampling noise."),
        option("Tokens", "--ignore-eos", is_flag=True, help="Do not stop at the model's end tokens."),
        _tokens_option("stop_token_ids", "More token ids that end a completion."),
        option(
            "Tokens",
            "--stop",
            multiple=True,
            metavar="TEXT",
            callback=lambda context, parameter, texts: tuple(text.replace("\\n", "\n") for text in texts),
            help=r"A text that ends a completion, which is cut before it; \n for a newline. Repeatable.",
        ),
        _tokens_option("suppress_tokens", "Token ids that are never chosen, at most 64."),
        _tokens_option("defer_tokens", "Token ids that are committed last, at most 64."),
    )
    for decorate in reversed(options):
        command = decorate(command)
    return command


def cache_options(command: F) -> F:
    """The options that are fields of CachePolicy, given to the command as `cache`, a mapping: empty for dense."""

    @wraps(command)
    def with_policy(*args: Any, mode: str | None, **options: Any) -> Any:
        fields = {name: options.pop(name) for name in _CACHE_FIELDS}
        return command(*args, cache=_policy(mode, fields), **options)

    decorated: F = _with_cache_options(with_policy)
    return decorated


def swept_cache_options(command: F) -> F:
    """The same with lists of retentions and selections, as `caches`: one mapping, or dense and each of many."""

    @wraps(command)
    def with_policies(*args: Any, mode: str | None, **options: Any) -> Any:
        fields = {name: options.pop(name) for name in _CACHE_FIELDS}
        swept: dict[Any, dict[str, Any]] = {}
        for selection, retention in product(*(fields[name] or (None,) for name in ("selection", "retention"))):
            told = None if retention in (None, 1) else selection  # what keeps everything selects nothing
            swept.setdefault((told, retention), {**fields, "selection": selection, "retention": retention})
        caches = [_policy(mode, one) for one in swept.values()]
        return command(*args, caches=caches if len(caches) == 1 else [{"mode": "none"}, *caches], **options)

    decorated: F = _with_cache_options(with_policies, listed=("retention", "selection"))
    return decorated


def _policy(mode: str | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a CachePolicy: those that were given, and a mode that goes with them."""
    given = {name: value for name, value in fields.items() if value is not None}
    if mode == "none" and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"--cache none decodes dense, so {names} would do nothing; leave one out")
    return {**given, "mode": mode or ("block" if given else "none")}


def _with_cache_options(command: Any, listed: Collection[str] = ()) -> Any:
    for name, (kind, text) in reversed(_CACHE_FIELDS.items()):
        command = api_option("Cache", name, kind, text, listed=name in listed)(command)
    modes = click.Choice(CHOICES["mode"])
    text = (
        "none: every pass computes every token; block: after a Refresh, the passes of a block compute the block alone. "
        "Default: none, or block where another of these options is given."
    )
    return option("Cache", "--cache", "mode", type=modes, metavar="NAME", help=text)(command)


def artifact_argument(command: F) -> F:
    """ARTIFACT, which must be one: refused at once, before torch is loaded."""
    return click.argument("artifact", type=click.Path(path_type=Path), callback=_an_artifact)(command)


def _an_artifact(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and not (path / "manifest.json").is_file():
        problem = "no artifact, for it has no manifest.json" if path.exists() else "no such directory"
        if (path / "model.json").is_file():
            problem = "an export, which is for another runtime"
        raise click.ClickException(f"{path}: {problem}; give a directory that `dllmc compile` wrote")
    return path


diff_option: Callable[[F], F] = option(
    "Output",
    "--diff",
    type=click.Path(path_type=Path),
    metavar="OLDER",
    callback=_an_artifact,
    help="Print what differs from another artifact instead: versions, model, options, passes, programs, memory, "
    "weights; with --program also a diff of all instructions.",
)
device_option: Callable[[F], F] = option(
    "Loading",
    "--device",
    metavar="NAME",
    help="Where to run: cpu, which any ARTIFACT can, or for one that was compiled for cuda, cuda or cuda:1; default: "
    "what it was compiled for.",
)
no_hash_option: Callable[[F], F] = option(
    "Loading",
    "--no-hash",
    is_flag=True,
    help="Take the weights' bytes as they are instead of hashing them, which takes seconds for each 10 GB. All else "
    "is checked.",
)


class _ThreadCount(click.ParamType[int | str]):
    """`auto` or a number of threads."""

    name = "threads"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        count: int = click.IntRange(1).convert(value, param, ctx)
        return count


threads_option: Callable[[F], F] = option(
    "Loading",
    "--threads",
    type=_ThreadCount(),
    metavar="N",
    default="auto",
    show_default=True,
    help="CPU threads that a step runs on; auto: as many as there are cores that other processes leave idle.",
)


def out_argument(command: F) -> F:
    """OUT or none, where nothing else may stand than an artifact: refused at once, before anything is compiled."""

    def check(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is not None and path.exists() and not (path / "manifest.json").is_file():
            raise click.ClickException(f"{path} exists and is no artifact; choose another output directory")
        return path

    return click.argument("out", type=click.Path(path_type=Path), required=False, callback=check)(command)


def _tokens_option(name: str, text: str) -> Callable[[F], F]:
    return option("Tokens", f"--{name.replace('_', '-')}", name, type=token_ids, metavar="IDS", default=(), help=text)

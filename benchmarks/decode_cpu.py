"""Decoding on the CPU: dllmc against the published decoders in eager torch, on a model with LLaDA-8B's vocabulary.

The model has LLaDA's layout and random weights. Every measurement is a fresh process, the methods take turns, and
figures are medians. Loading, compiling and a warm-up are not timed. In float32 dllmc must give the same tokens as the
dense decoder, and with a cache that keeps everything the same as the dual cache.

python -m benchmarks.decode_cpu
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

import dllmc
from benchmarks import baselines, report
from dllmc import artifact
from dllmc.models.llada import LLaDAConfig, LLaDAModel

T = TypeVar("T")
# (prompts [B][P], new tokens, steps) -> (completions [B][new], forward passes of the batch)
Decode = Callable[[list[list[int]], int, int], tuple[list[list[int]], int]]

DTYPES = ("float32", "bfloat16")
BASELINES: dict[str, Callable[..., baselines.Decoded]] = {
    "dense": baselines.dense,
    "dense, float32 softmax": partial(baselines.dense, softmax_dtype=torch.float32),
    "dual cache": baselines.dual_cache,
}
COMPILED = {
    "dllmc dense": dllmc.CachePolicy(mode="none"),
    "dllmc cached": dllmc.CachePolicy(),
    "dllmc cached, half": dllmc.CachePolicy(retention=0.5),
}
REFERENCE = "dense"
CACHED_REFERENCE = "dual cache"
SAME_TOKENS = {"dllmc dense": REFERENCE, "dllmc cached": CACHED_REFERENCE}
METHODS = (*BASELINES, *COMPILED)
SEED = 0
WEIGHT_STD = 0.02
WARM_UP_TOKENS = 8
PAGE_TOKENS = 32


@dataclass(frozen=True)
class Setting:
    """The model and what it decodes. Sizes in elements, lengths in tokens; `steps`: forward passes of a decode."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    mlp: int
    prompt: int
    new: int
    block: int
    steps: int
    dtype: str

    def config(self) -> dict[str, Any]:
        """The model as a LLaDA checkpoint's config.json has it."""
        return {
            "model_type": "llada",
            "d_model": self.hidden,
            "n_heads": self.heads,
            "n_layers": self.layers,
            "mlp_hidden_size": self.mlp,
            "vocab_size": self.vocab,
            "max_sequence_length": self.prompt + self.new,
            "rope": True,
            "weight_tying": False,
            "mask_token_id": self.vocab - 1,
            "eos_token_id": self.vocab - 2,
        }

    @property
    def token_kv_bytes(self) -> int:
        """Keys and values of a token in all layers."""
        return 2 * self.layers * self.hidden * getattr(torch, self.dtype).itemsize

    def prompts(self, requests: int) -> list[list[int]]:
        """Random prompts, the same in every process."""
        generator = torch.Generator().manual_seed(SEED)
        drawn: list[list[int]] = torch.randint(self.vocab - 2, (requests, self.prompt), generator=generator).tolist()
        return drawn


@dataclass(frozen=True)
class Measurement:
    """One decode in a process of its own.

    grown_bytes: the peak of resident memory, less what was resident after loading. planned_bytes: what an engine
    reserved for its steps when it was loaded, so that it is in neither; kv_bytes: what of that is the KV pool, which
    holds what all requests keep at once. peak_by: how the peak was measured.
    """

    tokens: list[list[int]]
    forward_passes: int
    seconds: float
    grown_bytes: int
    planned_bytes: int
    kv_bytes: int
    peak_bytes: int
    peak_by: str

    @property
    def memory_bytes(self) -> int:
        """What decoding takes besides the weights."""
        return self.grown_bytes + self.planned_bytes


def prepare(setting: Setting, requests: int, folder: Path) -> None:
    """Write the checkpoint, and the artifact that serves up to `requests` of the setting's requests in a step."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(setting.config()))
    with torch.device("meta"):
        shapes = LLaDAModel(LLaDAConfig.from_dict(setting.config())).state_dict()
    generator = torch.Generator().manual_seed(SEED)
    dtype = getattr(torch, setting.dtype)
    weights = {name: torch.ones(meta.shape) for name, meta in shapes.items()}
    for weight in weights.values():
        if weight.ndim > 1:  # the others are the norms'
            weight.normal_(0, WEIGHT_STD, generator=generator)
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, checkpoint / "model.safetensors")
    options = dllmc.CompileOptions(
        max_tokens_per_step=requests * (setting.prompt + setting.new),
        max_requests=requests,
        max_logit_rows=requests * setting.block,
        dtype=setting.dtype,
    )
    dllmc.compile(checkpoint, folder / "artifact", options)


def measure(method: str, setting: Setting, requests: int, folder: Path) -> Measurement:
    """Load, warm up, and decode once under the clock."""
    opened = _open_baseline if method in BASELINES else _open_dllmc
    decode, weights, planned, kv = opened(method, setting, requests, folder)
    for weight in weights:  # mapped from files: read every page now, so that memory grows by what decoding needs
        weight.flatten()[:: 4096 // weight.element_size()].sum()
    gc.collect()
    prompts = setting.prompts(requests)
    with report.PeakMemory() as memory:
        decode([prompt[:WARM_UP_TOKENS] for prompt in prompts], setting.block, 1)
        start = time.perf_counter()
        tokens, passes = decode(prompts, setting.new, setting.steps)
        seconds = time.perf_counter() - start
    return Measurement(tokens, passes, seconds, memory.peak - memory.start, planned, kv, memory.peak, memory.by)


def _open_baseline(
    method: str, setting: Setting, requests: int, folder: Path
) -> tuple[Decode, Iterable[Tensor], int, int]:
    model = dllmc.load_model(folder / "checkpoint", getattr(torch, setting.dtype))

    def decode(prompts: list[list[int]], new: int, steps: int) -> tuple[list[list[int]], int]:
        pace = baselines.Pace(new, setting.block, steps)
        decoded = BASELINES[method](model, torch.tensor(prompts), setting.vocab - 1, pace)
        return decoded.tokens.tolist(), decoded.forward_passes

    return decode, model.state_dict().values(), 0, 0


def _open_dllmc(
    method: str, setting: Setting, requests: int, folder: Path
) -> tuple[Decode, Iterable[Tensor], int, int]:
    """An engine whose KV pool holds what so many requests keep, and one page if they keep nothing."""
    policy = COMPILED[method]
    memory = artifact.read(folder / "artifact").memory
    kept = policy.kept(setting.prompt + setting.new - setting.block) if policy.mode == "block" else 0
    pages = max(requests * -(-kept // PAGE_TOKENS), 1)
    pool = pages * PAGE_TOKENS * setting.token_kv_bytes
    engine = dllmc.load(folder / "artifact", memory_budget=memory["total"] - memory["kv_pool"] + pool)

    def decode(prompts: list[list[int]], new: int, steps: int) -> tuple[list[list[int]], int]:
        params = dllmc.SamplingParams(gen_length=new, block_length=setting.block, steps=steps, ignore_eos=True)
        before = engine.steps
        results = engine.generate(prompts, params, policy)
        return [result.token_ids for result in results], engine.steps - before

    memory = engine.artifact.memory
    assert memory["kv_pool"] == pool
    return decode, engine.memory.weights.values(), memory["total"] - memory["weights"], pool


def in_fresh_process(what: str, function: Callable[..., T], *args: Any) -> T:
    """Call a function of this module in a process that does nothing else; `what` names it in an error."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise click.ClickException(f"{what}: the process was killed; is there enough memory?") from None


def measure_all(
    setting: Setting, methods: Sequence[str], request_counts: Sequence[int], repeats: int
) -> dict[tuple[int, str], list[Measurement]]:
    """`repeats` measurements of every method at every number of requests, the methods taking turns."""
    measured: dict[tuple[int, str], list[Measurement]] = {(n, m): [] for n in request_counts for m in methods}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        click.echo("writing the checkpoint and the artifact", err=True)
        in_fresh_process("compiling", prepare, setting, max(request_counts), folder)
        for repeat in range(repeats):
            for requests, method in measured:
                what = f"{method}, {requests} requests"
                one = in_fresh_process(what, measure, method, setting, requests, folder)
                measured[requests, method].append(one)
                click.echo(f"{repeat + 1}/{repeats}  {what}: {one.seconds:.2f} s", err=True)
    return measured


def summarise(requests: int, method: str, measured: dict[tuple[int, str], list[Measurement]]) -> dict[str, Any]:
    """Medians of a method's runs, and what they are of the references' at as many requests."""
    runs = measured[requests, method]
    references = {"dense": REFERENCE, "dual_cache": CACHED_REFERENCE}
    return {
        "requests": requests,
        "method": method,
        "tokens_per_s": sum(map(len, runs[0].tokens)) / statistics.median(run.seconds for run in runs),
        "forward_passes": runs[0].forward_passes,
        "memory_bytes": statistics.median(run.memory_bytes for run in runs),
        "kv_bytes": runs[0].kv_bytes,
        **{f"of_{name}": compare(runs, measured.get((requests, other), ())) for name, other in references.items()},
        "runs": [{k: v for k, v in asdict(run).items() if k != "tokens"} for run in runs],
    }


def compare(runs: Sequence[Measurement], reference: Sequence[Measurement]) -> dict[str, float | None] | None:
    """How much faster the runs are, what share of the memory they take, and of their tokens are the same.

    None where the reference was not measured.
    """
    if not reference:
        return None
    seconds, expected_seconds = (statistics.median(run.seconds for run in side) for side in (runs, reference))
    memory, expected_memory = (statistics.median(run.memory_bytes for run in side) for side in (runs, reference))
    tokens, expected = (torch.tensor([run.tokens for run in side]) for side in (runs, reference))
    return {
        "speedup": expected_seconds / seconds,
        "memory_ratio": memory / expected_memory if expected_memory else None,  # a tiny model may grow by nothing
        "same_tokens": (tokens == expected).double().mean().item(),
    }


def print_records(setting: Setting, records: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    """The table, with all that one must know to read it."""
    rows = [
        {
            "method": r["method"],
            "requests": r["requests"],
            "tokens/s": f"{r['tokens_per_s']:.2f}",
            "passes": r["forward_passes"],
            "memory MiB": f"{r['memory_bytes'] / 2**20:.1f}",
            "of it KV": f"{r['kv_bytes'] / 2**20:.1f}" if r["kv_bytes"] else "-",
            **{
                f"{what} {name.replace('_', ' ')}": _ratio(r[name], field, style)
                for name in ("of_dense", "of_dual_cache")
                for what, field, style in (
                    ("speed", "speedup", "{:.2f}x"),
                    ("memory", "memory_ratio", "{:.3f}"),
                    ("tokens", "same_tokens", "{:.1%}"),
                )
            },
        }
        for r in records
    ]
    s, most = setting, max(r["requests"] for r in records)
    title = f"Decoding {s.new} tokens after a prompt of {s.prompt} (block {s.block}, {s.steps} steps), {s.dtype} on CPU"
    notes = [
        f"model: LLaDA layout, random weights: vocabulary {s.vocab}, hidden {s.hidden}, {s.layers} layers, "
        f"{s.heads} heads, MLP {s.mlp}",
        f"steps: {s.new / s.steps:.3g} tokens each; one token a step would take {s.new} of them",
        "dense, dual cache: benchmarks/baselines.py, with the published float64 softmax unless another is named;",
        "  a cache approximates, so its tokens are others; dllmc cached keeps all, as the dual cache does, or half",
        "memory: the process's peak beyond the loaded weights, with the arena (planned for "
        f"{most} requests), state and KV pool that dllmc reserves at load",
        report.summary(facts),
    ]
    report.print_table(title, rows, notes)


def _ratio(compared: dict[str, float | None] | None, field: str, style: str) -> str:
    value = None if compared is None else compared[field]
    return "-" if value is None else style.format(value)


@click.command()
@click.option("--vocab", default=126464, show_default=True, help="Width of the head; the default is LLaDA-8B's.")
@click.option("--hidden", default=1024, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--heads", default=16, show_default=True)
@click.option("--mlp", default=3072, show_default=True, help="Width of the feed-forward layers.")
@click.option("--prompt", default=480, show_default=True, help="Tokens of each prompt.")
@click.option("--new", default=32, show_default=True, help="Tokens to decode after it.")
@click.option("--block", default=32, show_default=True, help="Tokens of a block.")
@click.option("--steps", default=6, show_default=True, help="Forward passes over all blocks.")
@click.option("--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True)
@click.option("--requests", "request_counts", multiple=True, type=click.IntRange(1), default=(1, 4), show_default=True)
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), default=METHODS, show_default=True)
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--out", type=click.Path(path_type=Path), help="The JSON file.  [default: decode_cpu_DTYPE.json]")
def main(
    request_counts: tuple[int, ...], methods: tuple[str, ...], repeats: int, out: Path | None, **setting: Any
) -> None:
    """Measure decoding on the CPU; the defaults take about 20 minutes on 2 cores."""
    facts, s = report.environment(), Setting(**setting)
    measured = measure_all(s, methods, request_counts, repeats)
    records = [summarise(requests, method, measured) for requests, method in measured]
    print_records(s, records, facts)
    for r in records if s.dtype == "float32" else ():
        compared = r.get(f"of_{SAME_TOKENS.get(r['method'], '').replace(' ', '_')}")
        if compared is not None and compared["same_tokens"] < 1:
            raise click.ClickException(
                f"{r['method']} gives other tokens than {SAME_TOKENS[r['method']]} at {r['requests']} requests; "
                "nothing written"
            )
    out = out or report.RESULTS / f"decode_cpu_{s.dtype}.json"
    report.write_json(out, {"environment": facts, "setting": asdict(s), "repeats": repeats, "results": records})


if __name__ == "__main__":
    main()

"""How far the resident memory of a process grows by one dense step over a sequence, in float32 on the CPU.

Every measurement is a process of its own. It warms up with a tiny model, so that what libraries load on first use is
there; then it opens a model and takes one step, and what counts is all that it has grown to at its peak, but for the
weights. An engine's memory counts whole: it is written to when it is loaded.
"""

import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import dllmc
from benchmarks import baselines, report
from benchmarks.context_planned import in_chunks
from benchmarks.decode_cpu import in_fresh_process
from dllmc.models.llada import LLaDAConfig, LLaDAModel

SEED = 0
ROWS = 32
"""Tokens behind the prompt, a block of masks, all of which the one step commits."""

TOLERANCE = 0.01
TRIES = 8
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Setting:
    """A model in LLaDA's layout with random weights, and the tokens that dllmc's loops and a chunked head take."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    mlp: int
    chunk: int

    @property
    def tiny(self) -> "Setting":
        """What a process warms up with: the same operators, next to nothing of memory."""
        return replace(self, vocab=256, hidden=8 * self.heads, layers=1, mlp=64)

    def model(self) -> LLaDAModel:
        """The same weights in every process."""
        torch.manual_seed(SEED)
        fields = {"d_model": self.hidden, "n_heads": self.heads, "n_layers": self.layers}
        widths = {"mlp_hidden_size": self.mlp, "vocab_size": self.vocab, "max_sequence_length": 4096}
        return LLaDAModel(LLaDAConfig.from_dict({**fields, **widths, "rope": True, "weight_tying": False})).eval()

    def bytes_a_token(self) -> dict[str, int]:
        """Decoder -> about what a token takes, from which the search for its longest sequence starts."""
        return {
            "eager, float32 softmax": (4 + 4) * self.vocab,
            "eager, float64 softmax": (4 + 8 + 8) * self.vocab,
            "eager, head in chunks": 4 * (6 * self.hidden + 3 * self.mlp),
            "dllmc": 4 * 3 * self.hidden,
        }


class Opened:
    """A model that a process may step once: its weights' bytes, and `step(prompt) -> tokens of the block`."""

    def __init__(self, method: str, setting: Setting, folder: Path) -> None:
        self.step: Callable[[list[int]], list[int]]
        if method == "dllmc":
            engine = dllmc.load(folder)
            weights = engine.memory.weights.values()
            params = dllmc.SamplingParams(gen_length=ROWS, block_length=ROWS, steps=1, ignore_eos=True)
            self.step = lambda prompt: list(engine.generate(prompt, params)[0].token_ids)
        else:
            model = setting.model()
            weights = model.state_dict().values()
            self.step = partial(_eager_step, method, model, setting)
        for weight in weights:  # mapped from files: every page is to be there, as it is counted
            weight.flatten()[:: 4096 // weight.element_size()].sum()
        self.weight_bytes = sum(weight.nbytes for weight in weights)


def _eager_step(method: str, model: LLaDAModel, setting: Setting, prompt: list[int]) -> list[int]:
    pace = baselines.Pace(ROWS, ROWS, steps=1)
    if method == "eager, head in chunks":
        tokens = torch.tensor([prompt + [setting.vocab - 1] * ROWS])
        return _with_head_in_chunks(model, tokens, setting.chunk)[0, -ROWS:].tolist()
    dtype = torch.float64 if method == "eager, float64 softmax" else torch.float32
    return baselines.dense(model, torch.tensor([prompt]), setting.vocab - 1, pace, dtype).tokens[0].tolist()


@torch.inference_mode()
def _with_head_in_chunks(model: LLaDAModel, tokens: Tensor, chunk: int) -> Tensor:
    """The best token of every position, [B, T]: layers as they are, then logits and softmax of a chunk at a time."""
    layers: Any = model.model["transformer"]
    head, layers["ff_out"] = layers["ff_out"], nn.Identity()
    try:
        hidden = model(tokens)
    finally:
        layers["ff_out"] = head
    best = [torch.softmax(head(part), -1).max(-1).indices for part in hidden.split(chunk, dim=1)]
    return torch.cat(best, dim=1)


def compile_step(setting: Setting, tokens: int, folder: Path) -> int:
    """Write the artifact of a step of one request with so many tokens; return the bytes of its arena and state."""
    passes = in_chunks(setting.chunk)
    options = dllmc.CompileOptions(max_tokens_per_step=tokens, max_requests=1, max_logit_rows=ROWS, passes=passes)
    spec = dllmc.ModelSpec(setting.vocab, setting.vocab - 1, (setting.vocab - 2,), max_positions=tokens)
    memory = dllmc.compile(setting.model(), folder, options, spec).memory
    return memory["arena"] + memory["state"]


def grow(method: str, setting: Setting, tokens: int, folder: Path) -> int:
    """Bytes that this process grows by, of which weights are none, for one step over so many tokens."""
    prompt = [token % (setting.vocab - 2) for token in range(tokens - ROWS)]
    Opened(method, setting.tiny, folder / "tiny").step([1] * (WARM_UP_TOKENS - ROWS))
    gc.collect()
    with report.PeakMemory() as memory:
        opened = Opened(method, setting, folder / "step")
        opened.step(prompt)
    return memory.peak - memory.start - opened.weight_bytes


def measure(method: str, setting: Setting, tokens: int, folder: Path) -> dict[str, int]:
    """The record of one length: how far a fresh process grew, and what was planned."""
    planned = 0
    if method == "dllmc":
        planned = in_fresh_process("compiling", compile_step, setting, tokens, folder / "step")
    grown = in_fresh_process(f"{method}, {tokens} tokens", grow, method, setting, tokens, folder)
    click.echo(f"{method}: {tokens} tokens, {grown / 2**20:.1f} MiB", err=True)
    return {"tokens": tokens, "grown_bytes": grown, "planned_bytes": planned}


def longest(method: str, setting: Setting, budget: int) -> dict[str, Any]:
    """Search for the longest sequence within a budget in bytes; the record of all tries, the best one's first.

    Growth is nearly linear in tokens: the next try is where the last one and the bytes of a token say, or where that is
    known to be too long or too short, in the middle of what is not known. Ends within 1 % of budget or length.
    """
    a_token = setting.bytes_a_token()[method]
    tokens, fits, exceeds = budget // a_token, WARM_UP_TOKENS, 2 * budget // a_token
    runs = list[dict[str, int]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if method == "dllmc":
            in_fresh_process("compiling", compile_step, setting.tiny, WARM_UP_TOKENS, folder / "tiny")
        while len(runs) < TRIES and exceeds - fits > max(1, TOLERANCE * fits):
            runs.append(measure(method, setting, tokens, folder))
            left = budget - runs[-1]["grown_bytes"]
            if left < 0:
                exceeds = min(exceeds, tokens)
            else:
                fits = max(fits, tokens)
            if 0 <= left <= TOLERANCE * budget:
                break
            tokens += int((left - TOLERANCE / 2 * budget) / a_token)
            if not fits < tokens < exceeds:
                tokens = (fits + exceeds) // 2
    fitting = [run for run in runs if run["grown_bytes"] <= budget]
    if not fitting:
        raise click.ClickException(f"{method}: no length stayed within {budget} bytes in {TRIES} tries: {runs}")
    return {"decoder": method, **max(fitting, key=lambda run: run["tokens"]), "runs": runs}

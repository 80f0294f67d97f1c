"""Engines on artifacts for cuda, on either device, and requests of every kind for them."""

from pathlib import Path
from typing import Any

import pytest

import dllmc
from tests.ops.calls import interpreted
from tests.runtime import streams

DEVICES = (pytest.param("cpu", marks=(pytest.mark.slow, interpreted)), pytest.param("cuda", marks=pytest.mark.gpu))
SMALL = {"max_tokens_per_step": 300, "max_requests": 7, "max_logit_rows": 70}


def engine_on(device: str, source: Any, out: Path, **options: Any) -> dllmc.Engine:
    """Compile for cuda and load on a device; on a CPU steps run as they do on a GPU: padded, recorded, and ahead."""
    spec = options.pop("spec", None)
    compiled = dllmc.compile(source, out, dllmc.CompileOptions(**options, device="cuda"), spec)
    if device == "cpu":
        return streams.engine_on(streams.Late(), compiled)
    return dllmc.Engine(compiled, device=device)


def requests(count: int = 24) -> tuple[list[list[int]], list[dllmc.SamplingParams], list[dllmc.CachePolicy]]:
    """Prompts of many lengths; dense and cached, greedy, sampled and guided ones, in turn."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 20},
        {"cfg_scale": 0.8},
        {"threshold": 0.02},
        {"temperature": 0.9, "top_p": 0.8},
        {"remasking": "entropy", "suppress_tokens": (1, 2, 3)},
        {"remasking": "topk_margin", "defer_tokens": tuple(range(0, 256, 4))},
        {"remasking": "random", "temperature": 1.0},
        {"cfg_scale": 0.5, "temperature": 0.7, "top_k": 50, "top_p": 0.9},
        {"steps": 9, "schedule": "timestep"},
    ]
    policies = (
        dllmc.CachePolicy(mode="none"),
        dllmc.CachePolicy(retention=0.5, delay=1),
        dllmc.CachePolicy(),
        dllmc.CachePolicy(retention=0.3, selection="shared", refresh_interval=3),
    )
    prompts = [[(7 * i + 13 * j) % 480 for j in range(1 + 7 * i % 90)] for i in range(count)]
    params = [
        dllmc.SamplingParams(gen_length=18, block_length=6, seed=i, ignore_eos=True, **kinds[i % len(kinds)])
        for i in range(count)
    ]
    return prompts, params, [policies[i % len(policies)] for i in range(count)]

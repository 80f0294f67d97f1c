"""Decoding with other ways to run a step than the engine's own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dllmc
from dllmc.artifact import Artifact
from dllmc.ir.program import PAGES, Program, Sizes
from dllmc.runtime.engine import Engine

DENSE, CACHED = dllmc.CachePolicy(mode="none"), dllmc.CachePolicy(retention=0.5)
Case = tuple[list[int], dllmc.CachePolicy, float]
# Prompt lengths, cache policy and guidance of requests that run together.
FORWARDS: Sequence[Case] = (
    ([5], DENSE, 0.0),
    ([23], CACHED, 0.0),
    ([37], CACHED, 0.0),
    ([4], DENSE, 1.5),
    ([9, 17, 12], CACHED, 0.0),
)
DENSE_CASES: Sequence[Case] = tuple(([length], DENSE, 0.0) for length in (1, 20, 41))
Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[Sizes, Mapping[str, Array]], Mapping[str, Array]]


class Recorded:
    """Runs steps as an executor does, and notes which programs ran."""

    def __init__(self, name: str, run: Run, ran: set[str]) -> None:
        self._name, self._run, self._ran = name, run, ran

    def run(self, sizes: Sizes, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        self._ran.add(self._name)
        return self._run(sizes, inputs)


def of_module(program: Program, module: Callable[..., Mapping[str, Tensor]], caches: Mapping[str, Tensor]) -> Any:
    """A module's forward as an executor's run."""
    own = {name: caches[name] for name in program.caches}

    @torch.no_grad()
    def run(sizes: Sizes, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        given = {name: torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in program.inputs}
        return {name: value.numpy() for name, value in module(inputs=given, caches=own).items()}

    return run


def engine_with(artifact: Artifact, runs: Mapping[str, Any], ran: set[str]) -> Engine:
    """An engine whose programs are run by other means."""
    engine = dllmc.load(artifact.path)
    engine._executors = {name: Recorded(name, run, ran) for name, run in runs.items()}  # type: ignore[misc]
    return engine


def agree(artifact: Artifact, modules: Mapping[str, Any], cases: Sequence[Case] = FORWARDS) -> set[str]:
    """Decode with the modules and with an engine; their tokens are one. Returns the programs that ran."""
    sizes = {PAGES: artifact.program.maxima[PAGES]}
    caches = {
        name: torch.zeros([dim.at(sizes) for dim in spec.shape]) for name, spec in artifact.program.caches.items()
    }
    ran: set[str] = set()
    runs = {name: of_module(artifact.programs[name], module, caches) for name, module in modules.items()}
    other, own = engine_with(artifact, runs, ran), dllmc.load(artifact.path)
    for lengths, policy, guidance in cases:
        prompts = [[10 + (3 * at + length) % 200 for at in range(length)] for length in lengths]
        params = [
            dllmc.SamplingParams(gen_length=12, block_length=6, steps=4 + 2 * i, ignore_eos=True, cfg_scale=guidance)
            for i in range(len(prompts))
        ]
        found, expected = (engine.generate(prompts, params, policy) for engine in (other, own))
        assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    return ran

"""Traces of requests, drawn from the mixes in workloads.json: when each comes, how long it is, at what pace it goes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parent / "workloads.json"


@dataclass(frozen=True)
class Arrival:
    """A request of a trace. seconds: since the trace began. Lengths in tokens, steps over the whole generation."""

    seconds: float
    prompt_length: int
    gen_length: int
    steps: int


@dataclass(frozen=True)
class Workloads:
    """The file's content: mixes by name, and what they are run with."""

    mixes: Mapping[str, Any]
    block_length: int
    requests: int
    loads: tuple[float, ...]
    seeds: tuple[int, ...]
    model: Mapping[str, Any]
    devices: Mapping[str, Mapping[str, float]]

    def trace(self, name: str, requests: int, rate: float, seed: int, scale: int = 1) -> list[Arrival]:
        """So many requests of a mix at a rate in requests a second; an infinite one has all come at once.

        scale: lengths are divided by it; generated ones stay multiples of the block.
        """
        random = np.random.default_rng([seed, list(self.mixes).index(name)])
        mix = self.mixes[name]
        parts = mix.get("parts", {name: 1.0})
        drawn = random.choice(list(parts), requests, p=list(parts.values()))
        times = self._times(mix, requests, rate, random)
        arrivals = []
        for time, part in zip(times, drawn, strict=True):
            kind = self.mixes[part]
            prompt, gen = (max(1, round(_length(kind[what], random) / scale)) for what in ("prompt", "gen"))
            blocks = -(-gen // self.block_length)
            paced = max(1, round(self.block_length * kind["steps_per_token"]))
            arrivals.append(Arrival(float(time), prompt, blocks * self.block_length, blocks * paced))
        return arrivals

    def _times(
        self, mix: Mapping[str, Any], requests: int, rate: float, random: np.random.Generator
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        size = mix.get("burst_size", 1)
        gaps = random.exponential(size, -(-requests // size))
        return np.repeat(np.cumsum(gaps), size)[:requests] / rate


def load(file: Path = FILE) -> Workloads:
    """Read the file."""
    content = json.loads(file.read_bytes())
    return Workloads(
        mixes=content["workloads"],
        block_length=content["block_length"],
        requests=content["requests"],
        loads=tuple(content["loads"]),
        seeds=tuple(content["seeds"]),
        model=content["model"],
        devices=content["devices"],
    )


def _length(kind: Mapping[str, float], random: np.random.Generator) -> int:
    drawn = random.lognormal(np.log(kind["median"]), kind["sigma"])
    return int(np.clip(round(drawn), kind["min"], kind["max"]))

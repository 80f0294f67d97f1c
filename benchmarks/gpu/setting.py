"""What the sections that run an engine share: the model, the requests, and the step that these need."""

from dataclasses import dataclass
from pathlib import Path

import torch

import dllmc
from benchmarks.gpu import models
from benchmarks.gpu.models import Compiled, Limits, Model

PAGE_TOKENS = 32
MOST_TOKENS = 65536
"""Of a step: more are no faster, and the arena grows with them."""

WARM_UPS = 3
"""Times that an engine decodes what is then measured: the first runs a step call by call, the second records it."""

POLICIES = {
    "dllmc dense": dllmc.CachePolicy(mode="none"),
    "dllmc cached": dllmc.CachePolicy(),
    "dllmc cached, half": dllmc.CachePolicy(retention=0.5),
    "dllmc cached, quarter": dllmc.CachePolicy(retention=0.25),
}


@dataclass(frozen=True)
class Point:
    """So many requests at once, their prompts of so many tokens."""

    prompt: int
    requests: int


@dataclass(frozen=True)
class Setting:
    """grid: what is decoded. new, block: tokens of a completion and of a block. steps: forward passes a block."""

    model: Model
    layers: int
    dtype: torch.dtype
    device: torch.device
    grid: tuple[Point, ...]
    new: int
    block: int
    steps: int

    @property
    def limits(self) -> Limits:
        """Of a step that holds the requests of any point, or as much of them as is worth it."""
        longest = max(point.prompt for point in self.grid) + self.new
        most = max(point.requests * (point.prompt + self.new) for point in self.grid)
        requests = max(point.requests for point in self.grid)
        return Limits(max(longest, min(most, MOST_TOKENS)), requests, requests * self.block)

    @property
    def pages(self) -> int:
        """Of the KV pool: what all requests of any point keep at once."""
        kept = dllmc.CachePolicy().kept
        each = {point: -(-kept(point.prompt + self.new - self.block) // PAGE_TOKENS) for point in self.grid}
        return max(point.requests * pages for point, pages in each.items())

    @property
    def blocks(self) -> int:
        return self.new // self.block

    def compiled(self, folder: Path) -> Compiled:
        """The programs, kept in the folder."""
        return models.kept(folder, self.model, self.layers, self.limits, self.dtype, self.device)

    def prompts(self, point: Point, longer: int = 0) -> list[list[int]]:
        """Random prompts, the same at every call; `longer` by so many tokens."""
        generator = torch.Generator().manual_seed(models.SEED)
        shape = point.requests, point.prompt + longer
        drawn: list[list[int]] = torch.randint(self.model.spec.mask_id, shape, generator=generator).tolist()
        return drawn

    def params(self, new: int) -> dllmc.SamplingParams:
        """Greedy decoding of so many tokens at the setting's pace."""
        steps = new // self.block * self.steps
        return dllmc.SamplingParams(gen_length=new, block_length=self.block, steps=steps, ignore_eos=True)


def setting_of(
    model: str, device: torch.device, size: str, prompts: tuple[int, ...], new: int | None, steps: int | None
) -> Setting:
    """The setting of a size: "small", "quick", "default" or "full". Some of it may be given, otherwise it is None."""
    if size == "small":
        chosen, block, grid = models.MODELS["tiny"], 8, [(24, 1), (24, 3)]
    else:
        chosen, block = models.MODELS[model], 32
        grid = {
            "quick": [(512, 1), (512, 16)],
            "default": [(512, 1), (512, 16), (512, 64), (512, 4), (2048, 16), (2048, 1)],
            "full": [(prompt, requests) for prompt in (512, 2048) for requests in (1, 4, 16, 64)],
        }[size]
    points = tuple(Point(*each) for each in grid if not prompts or each[0] in prompts)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = min(chosen.layers, 4) if size == "quick" else chosen.layers
    new = new or {"small": 16, "full": 256}.get(size, 64)
    return Setting(chosen, layers, dtype, device, points, new, block, steps or (4 if size == "small" else 8))

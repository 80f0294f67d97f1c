"""How kernels are launched: as `tuned.json` says for a GPU and a shape, or as the kernel's own default is.

    {compute capability: {kernel: {dtype: {bucket: {field: value}}}}}

The file is data that was measured offline (`benchmarks/tune.py`); nothing is measured where requests are served. A
bucket is the call's sizes, each rounded up to a power of two, so that neighbours share what was found for one of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

FILE = Path(__file__).with_name("tuned.json")

Config = TypeVar("Config")


@dataclass(frozen=True)
class Launch:
    """A program's elements at once, a power of two, and its warps."""

    tile: int
    warps: int = 4


def configured(default: Config, kernel: str, x: Tensor, **sizes: int) -> Config:
    """The default, a frozen dataclass, with the fields that are stored for calls of such sizes on x's device."""
    if not x.is_cuda:
        return default
    fields = stored(kernel, _capability(x.device), str(x.dtype).removeprefix("torch."), bucket(**sizes))
    return replace(default, **fields) if fields else default  # type: ignore[type-var]


def bucket(**sizes: int) -> str:
    """The key of calls of such sizes."""
    return ",".join(f"{name}={1 << max(size - 1, 0).bit_length()}" for name, size in sorted(sizes.items()))


def stored(kernel: str, capability: str, dtype: str, key: str) -> Mapping[str, Any]:
    """Fields that were found best, maybe none."""
    fields: Mapping[str, Any] = _all().get(capability, {}).get(kernel, {}).get(dtype, {}).get(key, {})
    return fields


@cache
def _all() -> Mapping[str, Any]:
    def as_fields(found: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}

    found: Mapping[str, Any] = json.loads(FILE.read_text(), object_hook=as_fields)
    return found


@cache
def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device)))

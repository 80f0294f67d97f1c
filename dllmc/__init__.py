"""dllmc: a compiler and compact runtime for diffusion language models. This module is the public API.

Names are imported on first use, so `import dllmc` is instant and a serving box never loads the compiler.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllmc.artifact import Artifact
    from dllmc.compiler import CompileOptions, compile
    from dllmc.models.checkpoint import load_model, load_spec
    from dllmc.runtime.engine import Engine, load
    from dllmc.runtime.params import CachePolicy, Prompt, SamplingParams
    from dllmc.runtime.request import GenerationResult
    from dllmc.runtime.snapshot import Snapshot
    from dllmc.spec import ModelSpec

_HOME = {
    "Artifact": "dllmc.artifact",
    "CachePolicy": "dllmc.runtime.params",
    "CompileOptions": "dllmc.compiler",
    "Engine": "dllmc.runtime.engine",
    "GenerationResult": "dllmc.runtime.request",
    "ModelSpec": "dllmc.spec",
    "Prompt": "dllmc.runtime.params",
    "SamplingParams": "dllmc.runtime.params",
    "Snapshot": "dllmc.runtime.snapshot",
    "compile": "dllmc.compiler",
    "load": "dllmc.runtime.engine",
    "load_model": "dllmc.models.checkpoint",
    "load_spec": "dllmc.models.checkpoint",
}

__all__ = [
    "Artifact",
    "CachePolicy",
    "CompileOptions",
    "Engine",
    "GenerationResult",
    "ModelSpec",
    "Prompt",
    "SamplingParams",
    "Snapshot",
    "compile",
    "load",
    "load_model",
    "load_spec",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dllmc' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__

"""dllmc: a compiler and compact runtime for diffusion language models. This module is the public API.

Names are imported on first use, so `import dllmc` is instant and a serving box never loads the compiler.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllmc.artifact import Artifact
    from dllmc.compiler import CompileOptions, compile
    from dllmc.errors import (
        ArtifactError,
        BudgetError,
        CancelledError,
        CaptureError,
        CheckpointError,
        ConfigError,
        DeadlineError,
        DeviceError,
        DllmcError,
        ExportError,
        PassError,
        ProgramError,
        QueueFullError,
        RequestError,
        StepError,
        TaskError,
    )
    from dllmc.models.checkpoint import load_model, load_spec
    from dllmc.runtime.async_engine import AsyncEngine
    from dllmc.runtime.engine import Engine
    from dllmc.runtime.handle import Request, Update
    from dllmc.runtime.likelihood import Score
    from dllmc.runtime.loading import load
    from dllmc.runtime.metrics import Stats
    from dllmc.runtime.params import CachePolicy, Prompt, SamplingParams
    from dllmc.runtime.request import GenerationResult
    from dllmc.runtime.snapshot import Snapshot
    from dllmc.spec import ModelSpec

_HOME = {
    "Artifact": "dllmc.artifact",
    "ArtifactError": "dllmc.errors",
    "AsyncEngine": "dllmc.runtime.async_engine",
    "BudgetError": "dllmc.errors",
    "CachePolicy": "dllmc.runtime.params",
    "CancelledError": "dllmc.errors",
    "CaptureError": "dllmc.errors",
    "CheckpointError": "dllmc.errors",
    "CompileOptions": "dllmc.compiler",
    "ConfigError": "dllmc.errors",
    "DeadlineError": "dllmc.errors",
    "DeviceError": "dllmc.errors",
    "DllmcError": "dllmc.errors",
    "Engine": "dllmc.runtime.engine",
    "ExportError": "dllmc.errors",
    "GenerationResult": "dllmc.runtime.request",
    "ModelSpec": "dllmc.spec",
    "PassError": "dllmc.errors",
    "ProgramError": "dllmc.errors",
    "Prompt": "dllmc.runtime.params",
    "QueueFullError": "dllmc.errors",
    "Request": "dllmc.runtime.handle",
    "RequestError": "dllmc.errors",
    "SamplingParams": "dllmc.runtime.params",
    "Score": "dllmc.runtime.likelihood",
    "Snapshot": "dllmc.runtime.snapshot",
    "Stats": "dllmc.runtime.metrics",
    "StepError": "dllmc.errors",
    "TaskError": "dllmc.errors",
    "Update": "dllmc.runtime.handle",
    "compile": "dllmc.compiler",
    "load": "dllmc.runtime.loading",
    "load_model": "dllmc.models.checkpoint",
    "load_spec": "dllmc.models.checkpoint",
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "AsyncEngine",
    "BudgetError",
    "CachePolicy",
    "CancelledError",
    "CaptureError",
    "CheckpointError",
    "CompileOptions",
    "ConfigError",
    "DeadlineError",
    "DeviceError",
    "DllmcError",
    "Engine",
    "ExportError",
    "GenerationResult",
    "ModelSpec",
    "PassError",
    "ProgramError",
    "Prompt",
    "QueueFullError",
    "Request",
    "RequestError",
    "SamplingParams",
    "Score",
    "Snapshot",
    "Stats",
    "StepError",
    "TaskError",
    "Update",
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

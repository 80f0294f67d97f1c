"""The whole compiler: open the model, capture a step, run the passes, write the artifact."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch
from torch import nn

from dllmc import artifact
from dllmc.artifact import Artifact
from dllmc.capture import capture
from dllmc.errors import ConfigError
from dllmc.models import checkpoint
from dllmc.passes import pipeline
from dllmc.spec import ModelSpec

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CompileOptions:
    """What a compiled step can take at most, and how it is compiled.

    max_tokens_per_step: packed tokens of a step (a guided request counts twice).
    max_requests: segments of a step (a guided request has two).
    max_logit_rows: masked positions that a step predicts; a block may be no longer.
    dtype: of a checkpoint's weights and activations, one of `DTYPES`; statistics of norms, softmax and logits are
        float32 in each. A bare module is compiled in the dtypes that it has.
    passes: pipeline text; see `dllmc.passes.pipeline`.
    """

    max_tokens_per_step: int = 4096
    max_requests: int = 64
    max_logit_rows: int = 1024
    dtype: str = "float32"
    passes: str = pipeline.DEFAULT_PIPELINE

    def __post_init__(self) -> None:
        for name, least in (("max_tokens_per_step", 2), ("max_requests", 1), ("max_logit_rows", 1)):
            if not least <= getattr(self, name) < 2**31:
                raise ConfigError(f"{name}: expected {least} or more, below 2**31, found {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {self.dtype!r}")

    @property
    def maxima(self) -> dict[str, int]:
        """The largest sizes of a step, in the program's symbols."""
        rows = self.max_logit_rows
        return {"tokens": self.max_tokens_per_step, "rows": rows, "guided": rows, "segments": self.max_requests}


def compile(
    source: str | Path | nn.Module,
    out: str | Path,
    options: CompileOptions | None = None,
    spec: ModelSpec | None = None,
    on_stage: Callable[[str, int, int], object] | None = None,
) -> Artifact:
    """Compile a checkpoint folder, a hub id or a module into an artifact directory at `out`.

    `spec` is needed for a bare module, which maps token ids [1, T] to logits [1, T, V]; a checkpoint brings its own.
    `on_stage(name, done, stages)` is called before each stage: opening the model, capturing, every pass, writing.
    Raises `CheckpointError`, `ConfigError`, `CaptureError`, `PassError` or `ArtifactError`.
    """
    options = options or CompileOptions()
    passes = pipeline.parse(options.passes)
    begins = _counting(on_stage, len(passes) + 3)
    begins("load the model")
    model, spec, tokenizer_files = _open(source, spec, options)
    begins("capture a step")
    step = capture(model, spec, options.maxima)
    log = pipeline.run(step, passes, on_pass=begins)
    if step.program is None or step.program.arena_bytes is None:
        raise ConfigError(f"passes {options.passes!r} make no planned program; end them with lower,plan-memory")
    begins("write the artifact")
    return artifact.write(
        Path(out),
        spec=spec,
        programs={step.program.name: step.program},
        tensors={name: step.tensors[name] for name in step.program.weights},
        tokenizer_files=tokenizer_files,
        options=asdict(options),
        passes=[{"pass": entry.text, "modified": entry.modified, **entry.stats} for entry in log],
        versions={"dllmc": version("dllmc"), "torch": torch.__version__},
    )


def _counting(on_stage: Callable[[str, int, int], object] | None, stages: int) -> Callable[[object], None]:
    """What to call with each stage as it begins; it knows how many there have been."""
    done = count()

    def begins(stage: object) -> None:
        if on_stage is not None:
            on_stage(str(stage), next(done), stages)

    return begins


def _open(
    source: str | Path | nn.Module, spec: ModelSpec | None, options: CompileOptions
) -> tuple[nn.Module, ModelSpec, list[Path]]:
    if isinstance(source, nn.Module):
        if spec is None:
            raise ConfigError("compiling a bare module needs spec=ModelSpec(vocab_size, mask_id, end_ids, ...)")
        return source, spec, []
    folder = checkpoint.resolve(source)
    model = checkpoint.load_model(folder, dtype=getattr(torch, options.dtype))
    return model, spec or checkpoint.load_spec(folder), checkpoint.tokenizer_files(folder)

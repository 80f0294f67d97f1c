"""The whole compiler: open the model, capture a step, run the passes, write the artifact."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from platform import python_version

import torch
from torch import nn

from dllmc import artifact
from dllmc.artifact import Artifact, Links
from dllmc.capture import capture
from dllmc.errors import ConfigError, PassError
from dllmc.ir.program import DEVICES, PAGES
from dllmc.ir.step_graph import StepGraph
from dllmc.ir.trace import Trace
from dllmc.models import checkpoint
from dllmc.models.shards import stored_tensors
from dllmc.passes import pipeline
from dllmc.passes.base import Observer, Pass, Values
from dllmc.passes.chunk_activations import ChunkActivations
from dllmc.passes.fit_budget import FitBudget
from dllmc.passes.lower import Lower
from dllmc.passes.recorder import Recorder
from dllmc.passes.sizing import with_rows
from dllmc.passes.verify import NumericCheck
from dllmc.runtime.arena import Memory
from dllmc.runtime.executor import Executor
from dllmc.spec import ModelSpec

DTYPES = ("float32", "bfloat16", "float16")
VERIFY = ("none", "numeric")
MAX_TOKENS_PER_STEP = 4096
MAX_LOGIT_ROWS = 1024
TOOLCHAIN = ("dllmc", "torch", "safetensors")
# The input that is as long as each size of a step.
_SIZED_BY = {
    "tokens": "token_ids",
    "rows": "row_segment",
    "guided": "guided",
    "segments": "segments",
    "active": "active",
}


@dataclass(frozen=True)
class CompileOptions:
    """What a compiled step can take at most, and how it is compiled.

    max_tokens_per_step: packed tokens of a step (a guided request counts twice). None: 4096; with a budget as many as
        fit, up to what the longest sequence has, if that is more.
    max_requests: segments of a step (a guided request has two).
    max_logit_rows: masked positions that a step predicts; a block may be no longer. None: 1024, or with a budget as
        many as fit.
    memory_budget: bytes of all that an engine allocates, weights, arena and state. A step then works on chunks of its
        tokens and rows, as large as fit. None: a step works on all at once.
    dtype: of a checkpoint's weights and activations, one of `DTYPES`; statistics of norms, softmax and logits are
        float32 in each. A bare module is compiled in the dtypes that it has.
    device: what operators' workspaces are planned for, "cpu" or "cuda". An artifact for cuda can be loaded on a CPU,
        but not the other way round. Compiling needs no such device.
    passes: pipeline text, see `dllmc.passes.pipeline`, or the passes themselves.
    verify: "numeric" runs the graph before and after each pass on random inputs, and the program at the end, and
        raises `PassError` where they disagree; for it a step must take its weights into memory.
    link_weights: the artifact refers to the checkpoint's safetensors, by the way from one to the other and their hash,
        instead of copying them; both must then stay where they are to each other.
    """

    max_tokens_per_step: int | None = None
    max_requests: int = 64
    max_logit_rows: int | None = None
    memory_budget: int | None = None
    dtype: str = "float32"
    device: str = DEVICES[0]
    passes: str | tuple[Pass, ...] = pipeline.DEFAULT_PIPELINE
    verify: str = "none"
    link_weights: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_tokens_per_step", 2), ("max_requests", 1), ("max_logit_rows", 1)):
            if getattr(self, name) is not None and not least <= getattr(self, name) < 2**31:
                raise ConfigError(f"{name}: expected {least} or more, below 2**31, found {getattr(self, name)}")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ConfigError(f"memory_budget: expected bytes, 1 or more, found {self.memory_budget}")
        for name, choices in (("dtype", DTYPES), ("device", DEVICES), ("verify", VERIFY)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}")

    @property
    def pipeline(self) -> tuple[Pass, ...]:
        """The passes, told of device and budget. Raises `PassError`: their text is no pipeline, or takes no budget."""
        passes = pipeline.parse(self.passes) if isinstance(self.passes, str) else self.passes
        if self.device != Lower.device:
            passes = tuple(Lower(self.device) if current.name == Lower.name else current for current in passes)
        if self.memory_budget is None:
            return passes
        told: dict[str, Pass] = {
            ChunkActivations.name: ChunkActivations(MAX_TOKENS_PER_STEP),  # more rows at a time are no faster
            FitBudget.name: FitBudget(
                self.memory_budget, tokens=self.max_tokens_per_step is None, rows=self.max_logit_rows is None
            ),
        }
        if missing := told.keys() - {current.name for current in passes}:
            names = ", ".join(sorted(missing))
            raise PassError(f"a memory budget needs the passes {names}, which are not in {pipeline.text_of(passes)}")
        return tuple(told.get(current.name, current) for current in passes)

    @property
    def maxima(self) -> dict[str, int]:
        """The largest sizes of a step, in the program's symbols; a budget may make them smaller."""
        tokens, rows = self.max_tokens_per_step or MAX_TOKENS_PER_STEP, self.max_logit_rows or MAX_LOGIT_ROWS
        return with_rows({"tokens": tokens, "segments": self.max_requests}, rows)


def compile(
    source: str | Path | nn.Module,
    out: str | Path,
    options: CompileOptions | None = None,
    spec: ModelSpec | None = None,
    *,
    on_stage: Callable[[str, int, int], object] | None = None,
    observers: Sequence[Observer] = (),
) -> Artifact:
    """Compile a checkpoint folder, a hub id or a module into an artifact directory at `out`.

    `spec` is needed for a bare module, which maps token ids [1, T] to logits [1, T, V]; a checkpoint brings its own.
    `on_stage(name, done, stages)` is called before each stage: opening the model, capturing, every pass, writing.
    `observers` look on while the passes run. Raises `CheckpointError`, `ConfigError`, `CaptureError`, `PassError`,
    `BudgetError` or `ArtifactError`.
    """
    options = options or CompileOptions()
    stages = _Stages(on_stage, len(options.pipeline) + 3)
    stages.begin("load the model")
    model, spec, tokenizer_files = _open(source, spec, options)
    stages.begin("capture a step")
    step, trace = rewrite(model, spec, options, stages, *observers)
    if step.program is None or step.program.arena_bytes is None:
        raise ConfigError(f"passes {options.passes!r} make no planned program; end them with lower,plan-memory")
    stages.begin("write the artifact")
    return artifact.write(
        Path(out),
        spec=spec,
        programs={program.name: program for program in (step.program, *step.phases.values())},
        tensors=step.tensors,
        tokenizer_files=tokenizer_files,
        options=asdict(options) | {"passes": pipeline.text_of(options.pipeline)},
        passes=[{"pass": entry.text, "modified": entry.modified, **entry.stats} for entry in trace.passes],
        versions={"python": python_version(), **{name: version(name) for name in TOOLCHAIN}},
        trace=trace,
        links=_links(source, step) if options.link_weights else None,
    )


def rewrite(
    model: nn.Module, spec: ModelSpec, options: CompileOptions, *observers: Observer
) -> tuple[StepGraph, Trace]:
    """Capture a step of a module and run the passes on it: the compiler without its files.

    Raises `CaptureError`, `PassError` or `BudgetError`.
    """
    maxima = options.maxima
    if options.memory_budget is not None and options.max_tokens_per_step is None:
        maxima["tokens"] = max(maxima["tokens"], spec.max_positions)
    step = capture(model, spec, maxima)
    check = NumericCheck(_execute) if options.verify == "numeric" else None
    recorder = Recorder(step, check)
    pipeline.run(step, options.pipeline, *([check] if check is not None else []), recorder, *observers)
    return step, recorder.trace


def _links(source: str | Path | nn.Module, step: StepGraph) -> Links:
    """What of a step's weights lies in the checkpoint as it is, or can be joined of what does."""
    if isinstance(source, nn.Module):
        raise ConfigError("link_weights: expected a checkpoint folder to link to, found a module; leave it out")
    stored = stored_tensors(checkpoint.resolve(source))
    files = {name: tensor.path for name, tensor in stored.items() if tensor.value.dim()}
    recipes = {name: step.tensors.sources(name) for name in step.tensors.names()}
    return Links(files, {name: parts for name, parts in recipes.items() if files.keys() >= set(parts)})


class _Stages(Observer):
    """Tells `on_stage` of each stage as it begins, passes among them."""

    def __init__(self, on_stage: Callable[[str, int, int], object] | None, stages: int) -> None:
        self._tell, self._stages, self._done = on_stage, stages, count()

    def begin(self, stage: str) -> None:
        if self._tell is not None:
            self._tell(stage, next(self._done), self._stages)

    def before(self, current: Pass, step: StepGraph) -> None:
        self.begin(str(current))


def _execute(step: StepGraph, inputs: Values) -> Values:
    """Run a planned program as an engine does, on caches as large as they are given."""
    assert step.program is not None
    program = step.program
    caches = [inputs[name] for name in program.caches]
    pages = {PAGES: caches[0].shape[2]} if caches else {}
    program = replace(program, maxima={**program.maxima, **pages})
    memory = Memory([program], {name: step.tensors[name] for name in program.weights})
    for name, values in zip(program.caches, caches, strict=True):
        memory.tensor(program, name, pages).copy_(values)
    sizes = {symbol: len(inputs.get(name, ())) for symbol, name in _SIZED_BY.items()}
    outputs = Executor(program, memory).run(sizes, {name: inputs[name].numpy() for name in program.inputs})
    return {name: torch.from_numpy(value.copy()) for name, value in outputs.items()}


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

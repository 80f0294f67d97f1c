"""An engine whose steps run in onnxruntime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import dllmc
from dllmc.export.onnx import PHASES

Array = np.ndarray[Any, np.dtype[Any]]


class Sessions:
    """The models of an export, and the caches that they share; as an engine's executors."""

    def __init__(self, folder: Path, pages: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.models = {
            phase: onnxruntime.InferenceSession(folder / f"{phase}.onnx", options, ["CPUExecutionProvider"])
            for phase in PHASES
            if (folder / f"{phase}.onnx").exists()
        }
        self.caches: dict[str, Array] = {}
        for model in self.models.values():
            for given in model.get_inputs():
                if given.name.startswith("cache."):
                    shape = [pages if isinstance(dim, str) else dim for dim in given.shape]
                    kind = np.float16 if "float16" in given.type else np.float32
                    self.caches.setdefault(given.name, np.zeros(shape, kind))

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One step: all that the model returns, caches left out, which are updated."""
        model = self.models[phase]
        given = {one.name: (self.caches | dict(inputs))[one.name] for one in model.get_inputs()}
        names = [one.name for one in model.get_outputs()]
        found = dict(zip(names, model.run(names, given), strict=True))
        for name in [name for name in found if name.endswith(".updated")]:
            self.caches[name.removesuffix(".updated")] = found.pop(name)
        return found


class Executor:
    """One phase of `Sessions`, as an engine runs it."""

    def __init__(self, sessions: Sessions, phase: str) -> None:
        self.sessions, self.phase = sessions, phase

    def run(self, sizes: Mapping[str, int], inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.sessions.run(self.phase, inputs)


def engine_of(artifact: Path, exported: Path) -> dllmc.Engine:
    """An engine of an artifact whose steps the export's models run."""
    engine = dllmc.load(artifact)
    sessions = Sessions(exported, 0 if engine.pool is None else engine.pool.pages)
    engine._executors = {phase: Executor(sessions, phase) for phase in sessions.models}  # type: ignore[misc]
    return engine

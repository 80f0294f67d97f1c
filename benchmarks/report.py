"""What benchmarks share: facts of where they run, peak memory, one table on the terminal, one JSON file.

Facts of the machine are those that bear on the figures; names of hosts, users and folders are left out.
"""

import json
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllmc.cli.report import table

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Processor, memory, versions, and how busy the machine was: a load well above 0 at the start taints figures."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dllmc": _version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def summary(facts: Mapping[str, Any]) -> str:
    """`environment()` in a line."""
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, "
        f"load {facts['load_average_at_start']} at the start"
    )


def print_table(title: str, rows: Sequence[Mapping[str, object]], notes: Sequence[str] = ()) -> None:
    """Print rows under the names of their first row's columns, aligned, the title above and the notes below."""
    print(f"\n{title}\n")
    for line in table([{name: str(value) for name, value in row.items()} for row in rows]):
        print(line)
    print("".join(f"\n{note}" for note in notes))


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a benchmark's figures, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=1) + "\n")
    print(f"wrote {path.name}")


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process now, or another of its counts in the kernel's status file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class PeakMemory:
    """Resident memory of this process, in bytes: at the start of a `with` block, and the most inside it.

    The kernel keeps the peak and can be told to forget an older one; where it may not be told, samples stand in.
    """

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = resident_bytes()
        self._done = threading.Event()
        self._sampler: threading.Thread | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.by = "VmHWM"
        except OSError:
            self.by = "VmRSS, sampled every 2 ms"
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._sampler is None:
            self.peak = resident_bytes("VmHWM")
        else:
            self._done.set()
            self._sampler.join()

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, resident_bytes())


@dataclass
class LiveBytes(TorchDispatchMode):
    """Within it, `peak` is the most that storages made by operators have taken together, after any operator."""

    peak: int = 0
    given: set[int] = field(default_factory=set)
    made: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        read = [t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.given.update(storage for storage in read if storage not in self.made)
        result = func(*args, **(kwargs or {}))
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if not ref.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.given:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return result


def _version() -> str:
    try:
        return version("dllmc")
    except PackageNotFoundError:
        return "not installed, run from its source"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )

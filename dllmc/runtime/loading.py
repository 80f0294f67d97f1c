"""From an artifact on the disk to an engine: what must hold before anything is allocated."""

from pathlib import Path

import torch

from dllmc import artifact
from dllmc.artifact import Artifact
from dllmc.errors import ArtifactError, BudgetError, ProgramError
from dllmc.ir import interface
from dllmc.runtime.device import CPU, resolve, room_bytes
from dllmc.runtime.engine import MAX_QUEUE, Engine
from dllmc.runtime.table import BYTES_OF_POSITION


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    memory_budget: int | None = None,
    scheduler: str = "multiplexed",
    max_queue: int = MAX_QUEUE,
    *,
    hash_weights: bool = True,
    threads: int | str | None = None,
) -> Engine:
    """Open an artifact and allocate what its plan says: `artifact.memory["total"]` bytes.

    `device`: "cpu", on which any artifact runs, or for one that was compiled for cuda "cuda" or "cuda:1"; None: what it
    was compiled for. `memory_budget`: the most bytes that may be allocated; the KV pool has what weights, arena and
    state leave of it. None: the pool is as large as it was compiled. `scheduler`: "multiplexed", or for comparison
    "fcfs" or "static" (`dllmc.runtime.scheduler`); tokens are the same. `max_queue`: requests that may wait in line.
    `hash_weights` false: the weights' bytes are taken as they are, which saves reading them once; all else is checked.
    `threads`: CPU threads of a step; "auto" uses the cores that other processes leave, and follows their load; None
    leaves torch's number as it is.

    Raises `ArtifactError`; `DeviceError` where the machine has no such device, or the artifact is for another; and
    `BudgetError` where not a page is left, or the device has less memory than it takes.
    """
    opened = artifact.read(path, hash_weights=hash_weights)
    require_servable(opened)
    chosen = resolve(device, opened.device, str(opened.path))
    if memory_budget is not None:
        opened = _within(opened, memory_budget)
    require_room(opened, chosen)
    return Engine(opened, scheduler, max_queue, str(chosen), threads=threads)


def require_servable(opened: Artifact) -> None:
    """Raise `ArtifactError` for programs that no engine can run."""
    try:
        interface.check(opened.programs, opened.spec)
    except ProgramError as error:
        raise ArtifactError(f"{opened.path}: {error}") from error


def require_room(opened: Artifact, device: torch.device = CPU) -> None:
    """Raise `BudgetError` for an artifact that takes more memory than a device has."""
    limits = opened.program.maxima
    needed, room = opened.memory["total"], room_bytes(device)
    if device.type == "cpu":
        tables = limits["segments"] * min(opened.spec.max_positions, limits["tokens"]) * BYTES_OF_POSITION
        if needed + tables > room:
            raise BudgetError(
                f"{opened.path}: it takes {needed + tables} bytes, {needed} for its plan and {tables} for requests, "
                f"but this machine has {room}; compile with a memory budget, or load on a larger machine"
            )
    elif needed > room:
        raise BudgetError(
            f"{opened.path}: it takes {needed} bytes of {device}, of which {room} are free; end what else uses it, "
            "compile with a memory budget, or load on a larger device"
        )


def _within(opened: Artifact, memory_budget: int) -> Artifact:
    """The artifact with as many pages of the KV pool as a budget leaves it."""
    fixed = opened.memory["total"] - opened.memory["kv_pool"]
    page = max(program.page_bytes for program in opened.programs.values())
    if fixed + page > memory_budget:
        parts = ", ".join(f"{name} {opened.memory[name]}" for name in ("weights", "arena", "state"))
        raise BudgetError(
            f"{opened.path}: expected a memory budget of {fixed + page} bytes or more ({parts}, a page of the KV pool "
            f"{page}), found {memory_budget}; compile with a memory budget to have a smaller arena"
        )
    return opened.with_pages((memory_budget - fixed) // page) if page else opened

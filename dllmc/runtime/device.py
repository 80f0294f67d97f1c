"""Where an engine runs: which device is meant, whether this machine has it, and how much memory is left there."""

import os
from contextlib import suppress

import torch

from dllmc.errors import DeviceError

CPU = torch.device("cpu")


def resolve(wanted: str | torch.device | None, planned: str, where: str) -> torch.device:
    """The device to run an artifact on that was compiled for `planned`: that one, unless another is wanted.

    wanted: "cpu", on which any artifact runs, "cuda" or "cuda:1". Raises `DeviceError`: nothing is chosen silently.
    """
    device = None
    if wanted is None or isinstance(wanted, str | torch.device):
        with suppress(RuntimeError):
            device = torch.device(planned if wanted is None else wanted)
    if device is None or device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device is {wanted!r}; expected 'cpu', 'cuda', 'cuda:1' and so on, or None")
    if device.type == "cpu":
        return CPU
    if planned != "cuda":
        next_step = 'compile with device="cuda" (--device cuda)'
        raise DeviceError(f"{where}: compiled for {planned}, so it cannot run on {device}; {next_step}")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{where}: compiled for cuda, but torch finds no CUDA device on this machine; "
            'load it with device="cpu" (--device cpu), or where there is a GPU that torch supports'
        )
    index, count = device.index if device.index is not None else torch.cuda.current_device(), torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"{where}: device is {str(device)!r}, but this machine has {count} CUDA devices, from 0 on")
    return torch.device("cuda", index)


def room_bytes(device: torch.device) -> int:
    """Bytes that an engine may allocate: of a CPU all that the machine has, of a GPU what no one holds now."""
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

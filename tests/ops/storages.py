"""Watches what memory torch's operators return tensors in, and what they take while they run."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class _Watch(TorchDispatchMode):
    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.new_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.new_bytes += tensor.untyped_storage().nbytes()
        return result


def bytes_outside(memory: list[Tensor], call: Callable[[], object]) -> int:
    """Bytes of the tensors that operators return during a call and that do not lie in the memory given."""
    with _Watch({tensor.untyped_storage().data_ptr() for tensor in memory}) as watch:
        call()
    return watch.new_bytes


def blocks_taken(call: Callable[[], object]) -> list[int]:
    """Bytes of every block that torch takes from its CPU allocator during a call, also of those given back at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        call()
    events = watch.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]

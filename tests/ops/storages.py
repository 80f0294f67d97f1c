"""Watches what memory torch's operators return tensors in."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
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

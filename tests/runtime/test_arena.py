"""The memory that an engine owns is the size that it was allocated with."""

import pytest
import torch

from dllmc.runtime.arena import Block


def test_no_result_makes_it_larger() -> None:
    """Torch resizes an `out=` of another shape, beyond the end of its memory if it must."""
    block = Block(64)
    last = block.of("float32")[15:]
    with pytest.raises(RuntimeError, match="resize"):
        torch.abs(torch.ones(2), out=last)
    assert block.bytes.untyped_storage().nbytes() == 64

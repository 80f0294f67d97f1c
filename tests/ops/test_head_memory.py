"""What the fused head holds besides its workspace, counted over the tensors of its own that are alive together."""

import pytest
import torch

from benchmarks.report import LiveBytes
from dllmc.ops import decode_head
from dllmc.ops.decode_head import ConfidenceRule, workspace_bytes
from tests.ops.head_cases import Segment, random

ROWS, VOCAB, WIDTH = 1024, 5000, 16
MIB = 1 << 20


@pytest.mark.parametrize(
    ("segment", "limit"),
    [
        (Segment(), 2 * MIB),
        (Segment(rule=ConfidenceRule.TOPK_MARGIN), 2 * MIB),
        (Segment(rule=ConfidenceRule.ENTROPY), 2 * MIB),
        (Segment(temperature=1.0), 4 * MIB),
        (Segment(temperature=1.0, top_k=50), 5 * MIB),
        (Segment(temperature=1.0, top_p=0.9), 4 * ROWS * 1024 * 8),
    ],
    ids=["greedy", "margin", "entropy", "sampled", "top-k", "top-p"],
)
def test_transients_of_a_thousand_rows(segment: Segment, limit: int) -> None:
    """Whatever all rows want: a few MiB; with top-p four times its 1024 candidates a row, 8 bytes each."""
    case = random(ROWS, VOCAB, WIDTH, [segment])
    outs = {name: torch.empty(ROWS) for name in ("confidence", "logprob")}
    outs["token"] = torch.empty(ROWS, dtype=torch.int64)
    workspace = torch.empty(workspace_bytes(ROWS, VOCAB, WIDTH, torch.float32), dtype=torch.uint8)
    with LiveBytes() as live:
        decode_head.decode_head_out(*case.args, **outs, workspace=workspace)
    assert live.peak <= limit

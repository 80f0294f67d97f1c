"""`benchmarks/max_context.py`: what it counts of shapes and plans is what a hand counts."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner

from benchmarks.max_context import main
from benchmarks.report import LiveBytes

GIB = 1 << 30


def test_live_bytes_are_those_of_storages_that_operators_made() -> None:
    """Views, inputs and what is gone again do not count: of three tensors of 4 KiB, two are alive together."""
    given = torch.ones(1024)
    with LiveBytes() as live:
        first = given.view(32, 32) + 1
        second = first * 2
        del first
        second.add_(given.view(32, 32))
        second = second.view(-1) + 1
    assert live.peak == 2 * 4096


def test_longest_sequences_at_published_shapes(tmp_path: Path) -> None:
    """Bound and eager decoders by the arithmetic of their shapes; dllmc within 10 % of the bound, never above it."""
    out = tmp_path / "max_context.json"
    args = ["--layers", "1", "--budget-gib", "1", "--out", str(out)]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    records = {(r["model"], r["decoder"]): r for r in json.loads(out.read_text())["planned"]["results"]}
    kib_of_kv = {"LLaDA-8B": (126464, 8 + 8 + 8), "Dream-7B": (152064, 7 + 1 + 1)}
    for model, (vocab, kib) in kib_of_kv.items():
        tokens = {decoder: r["tokens"] for (name, decoder), r in records.items() if name == model}
        assert tokens["residual + K + V"] == GIB // (kib * 1024)
        assert tokens["eager, bfloat16 softmax"] == GIB // (4 * vocab)
        assert tokens["eager, float64 softmax"] == GIB // (18 * vocab)
        assert tokens["eager, float64 softmax"] < tokens["eager, head in chunks"] < tokens["dllmc"]
        assert 0.9 * tokens["residual + K + V"] <= tokens["dllmc"] <= tokens["residual + K + V"]

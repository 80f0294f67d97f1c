"""`benchmarks/max_context.py`: what it counts of shapes and plans is what a hand counts, and its search finds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import context_measured
from benchmarks.context_measured import ROWS, Opened, Setting, compile_step
from benchmarks.max_context import main
from benchmarks.report import LiveBytes

GIB = 1 << 30
SETTING = Setting(vocab=97, hidden=32, layers=2, heads=4, mlp=48, chunk=24)


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


def invented(decoder: str, setting: Setting, tokens: int, folder: Path) -> dict[str, int]:
    """A growth of 5 MiB, 3 KiB a token, and 1 MiB more from 2000 tokens on."""
    grown = (5 << 20) + 3072 * tokens + ((tokens >= 2000) << 20)
    return {"tokens": tokens, "grown_bytes": grown, "planned_bytes": 0}


def test_published_shapes_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound and eager decoders by the arithmetic of their shapes; dllmc within 10 % of the bound, never above it."""
    monkeypatch.setattr(context_measured, "measure", invented)
    monkeypatch.setattr(context_measured, "in_fresh_process", lambda *_: None)
    out = tmp_path / "max_context.json"
    args = ["--depth", "2", "--budget-gib", "1", "--budget-mib", "100", "--out", str(out)]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    records = {(r["model"], r["decoder"]): r for r in written["planned"]["results"]}
    of_shape = {"LLaDA-8B": (126464, 8 + 8 + 8), "Dream-7B": (152064, 7 + 1 + 1)}  # KiB of residual, K and V
    for model, (vocab, kib) in of_shape.items():
        tokens = {decoder: r["tokens"] for (name, decoder), r in records.items() if name == model}
        assert tokens["residual + K + V"] == GIB // (kib * 1024)
        assert tokens["eager, bfloat16 softmax"] == GIB // (4 * vocab)
        assert tokens["eager, float64 softmax"] == GIB // (18 * vocab)
        assert tokens["eager, float64 softmax"] < tokens["eager, head in chunks"] < tokens["dllmc"]
        assert 0.9 * tokens["residual + K + V"] <= tokens["dllmc"] <= tokens["residual + K + V"]
    assert [r["decoder"] for r in written["measured"]["results"]] == [*SETTING.bytes_a_token()]


@pytest.mark.parametrize("decoder", ["eager, float64 softmax", "dllmc"])
@pytest.mark.parametrize("budget_mib", [9, 11, 20])
def test_search_ends_close_to_the_longest(decoder: str, budget_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However wrong the first guess is: what is found is within the budget, and not 3 % short of the longest."""
    monkeypatch.setattr(context_measured, "measure", invented)
    monkeypatch.setattr(context_measured, "in_fresh_process", lambda *_: None)
    setting = replace(SETTING, vocab=200, hidden=512)  # 4000 or 6144 bytes a token are guessed
    found = context_measured.longest(decoder, setting, budget_mib << 20)
    longest = max(n for n in range(20_000) if invented("", setting, n, Path())["grown_bytes"] <= budget_mib << 20)
    assert 0.97 * longest <= found["tokens"] <= longest
    assert found["grown_bytes"] <= budget_mib << 20


def test_every_decoder_takes_the_same_step(tmp_path: Path) -> None:
    """What is measured is one computation: from the same prompt all commit the same tokens."""
    prompt = [(7 * i) % 90 for i in range(40)]
    compile_step(SETTING, len(prompt) + ROWS, tmp_path / "step")
    tokens = {decoder: Opened(decoder, SETTING, tmp_path / "step").step(prompt) for decoder in SETTING.bytes_a_token()}
    assert len(tokens["dllmc"]) == ROWS
    assert all(found == tokens["dllmc"] for found in tokens.values()), tokens


@pytest.mark.slow
def test_growth_is_measured_in_fresh_processes(tmp_path: Path) -> None:
    """Of twice as many tokens the two tensors [tokens, V] grow by their size, and dllmc by far less."""
    setting = Setting(vocab=20_000, hidden=32, layers=1, heads=4, mlp=48, chunk=64)
    compile_step(setting.tiny, context_measured.WARM_UP_TOKENS, tmp_path / "tiny")
    softmax, dllmc = (
        [context_measured.measure(decoder, setting, tokens, tmp_path)["grown_bytes"] for tokens in (512, 1024)]
        for decoder in ("eager, float32 softmax", "dllmc")
    )
    assert 0.9 <= (softmax[1] - softmax[0]) / (512 * 2 * 20_000 * 4) <= 1.5
    assert dllmc[1] < softmax[1] / 8

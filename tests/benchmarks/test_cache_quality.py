"""The benchmark of what caching costs: its statistics, and a run of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import cache_quality


def test_a_record_is_of_the_same_examples() -> None:
    """Mean differences to dense decoding are 0.1 with a standard deviation of 0.1 over three examples."""
    record = cache_quality.record("shared", 0.5, measured=[1.0, 2.1, 3.2], dense=[1.0, 2.0, 3.0])
    assert record["score"] == pytest.approx(2.1)
    assert record["difference"] == pytest.approx(0.1)
    assert record["difference_interval"] == pytest.approx([0.1 - 0.11316, 0.1 + 0.11316], abs=1e-4)


def test_every_policy_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every task, dense decoding first; it differs from itself by nothing."""
    monkeypatch.setattr(cache_quality, "RETENTIONS", {"per_head": (1.0, 0.5), "shared": (0.5,)})
    out = tmp_path / "quality.json"
    options = ["--code", "0", "--answers", "3", "--out", str(out)]
    result = CliRunner().invoke(cache_quality.main, options, catch_exceptions=False)
    assert result.exit_code == 0
    tasks: dict[str, Any] = json.loads(out.read_text())["tasks"]
    assert list(tasks) == ["sudoku", "add"]
    for task in tasks.values():
        named = [(r["selection"], r["retention"]) for r in task["results"]]
        assert named == [("dense", 1.0), ("per_head", 1.0), ("per_head", 0.5), ("shared", 0.5)]
        assert task["results"][0]["difference_interval"] == [0.0, 0.0]

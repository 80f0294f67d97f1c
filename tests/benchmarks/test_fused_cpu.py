"""`benchmarks/fused_cpu.py`: what it compares is the same arithmetic, and every case has its record."""

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.fused_cpu import main


def test_every_operator_is_measured_against_what_it_replaces(tmp_path: Path) -> None:
    """The run fails where a fused operator gives other results than the calls it replaces."""
    out = tmp_path / "fused_cpu.json"
    args = ["--tokens", "1", "--tokens", "3", "--repeats", "1", "--out", str(out)]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    records = json.loads(out.read_text())["results"]
    of_op = {"rms_norm": 3, "add_rms_norm": 3, "add_layer_norm": 3, "rope": 4, "rope, gathered": 4, "glu": 3}
    assert len(records) == 2 * 2 * sum(of_op.values())
    assert {r["op"] for r in records} == set(of_op)
    assert all(r["of_replaced"] > 0 for r in records)

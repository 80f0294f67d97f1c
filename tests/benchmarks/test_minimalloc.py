"""The planner's benchmark reads instances of the published format, and says what it found."""

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.minimalloc import main

INSTANCES = Path(__file__).parents[1] / "memory" / "minimalloc"


def test_a_small_instance(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = CliRunner().invoke(main, [str(INSTANCES / "input.12.csv"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    [record] = json.loads(out.read_text())["results"]
    assert (record["buffers"], record["capacity"], record["height"]) == (5, 12, 12)
    assert record["solved"]
    assert record["optimal"]
    assert "input.12.csv" in done.output


def test_files_that_are_no_instances(tmp_path: Path) -> None:
    """The message names the file and what it should have."""
    for name, text, message in (
        ("a.csv", "id,lower,upper,size\n", "expected a name such as"),
        ("a.7.csv", "id,lower,upper\nx,0,1\n", "expected the integer columns"),
        ("b.7.csv", "id,lower,upper,size\nx,0,one,2\n", "expected the integer columns"),
    ):
        (tmp_path / name).write_text(text)
        done = CliRunner().invoke(main, [str(tmp_path / name), "--out", str(tmp_path / "none.json")])
        assert done.exit_code == 1
        assert message in done.output
        assert name in done.output

"""Watching the compiler from the command line: graphs, times, errors, passes."""

import json
import re
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import dllmc
from dllmc.artifact import read
from dllmc.cli import main
from dllmc.ir.graph_printer import COMMENT, text_of
from dllmc.ir.trace import Trace, calls
from dllmc.passes import pipeline
from tests.artifacts import edit_manifest, read_manifest
from tests.cli.test_commands import is_one_line, run
from tests.golden.cases import ROOT

MODEL = ROOT / "llada-mha"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dllmc.compile(MODEL, tmp_path_factory.mktemp("compiled") / "out").path


@pytest.fixture(scope="module")
def trace(artifact: Path) -> Trace:
    trace = read(artifact).load_trace()
    assert trace is not None
    return trace


def test_print_between_passes(artifact: Path, trace: Trace, tmp_path: Path) -> None:
    """A heading a pass; below it the graph's text, as the trace has it, where the pass changed it; then as without."""
    printed = run("compile", MODEL, tmp_path / "out", "--print-between-passes")
    assert printed.exit_code == 0, printed.output
    first, *sections = re.split(r"^=== ", printed.stdout, flags=re.MULTILINE)
    assert first == ""
    assert sections[0].rstrip() == "capture\n" + text_of(trace.graphs[0])
    for section, entry in zip(sections[1:], trace.passes, strict=True):
        heading, _, text = section.partition("\n")
        assert heading.startswith(f"{entry.text}: ")
        if entry.modified:
            assert text.startswith(
                "".join(f"note: {note}\n" for note in entry.notes) + text_of(trace.graphs[entry.graph])
            )
        else:
            assert heading.endswith("; the graph is as it was")
    rest = run("compile", MODEL, tmp_path / "out").stdout
    assert printed.stdout.endswith(rest)


def test_time_passes(tmp_path: Path) -> None:
    """A line a pass with its times, share and calls, and one of all; shares add up."""
    result = run("compile", MODEL, tmp_path / "out", "--time-passes")
    header, *lines = [line.split() for line in result.stdout.splitlines() if line.startswith("time ")]
    trace = read(tmp_path / "out").load_trace()
    assert trace is not None
    assert header[1:] == ["pass", "pass", "s", "checks", "s", "share", "calls"]
    assert [line[1] for line in lines] == [*(entry.text for entry in trace.passes), "all"]
    assert sum(float(line[4].rstrip("%")) for line in lines[:-1]) == pytest.approx(100, abs=1)
    for index, (line, entry) in enumerate(zip(lines, trace.passes, strict=False)):
        assert float(line[2]) >= 0
        before, after = calls(trace.before(index)), calls(trace.graphs[entry.graph])
        told = [f"{before}", "->", f"{after}"] if entry.modified else [f"{after},", "not", "modified"]
        assert line[5:] == told


def test_verify(tmp_path: Path) -> None:
    """The error of each pass that was checked: those that modified the graph, and the plan. All are roundings."""
    result = run("compile", MODEL, tmp_path / "out", "--verify")
    assert result.exit_code == 0, result.output
    errors = {line.split()[1]: float(line.split()[-1]) for line in result.stdout.splitlines() if line[:7] == "verify "}
    trace = read(tmp_path / "out").load_trace()
    assert trace is not None
    assert list(errors) == [entry.text for entry in trace.passes if entry.modified or entry.name == "plan-memory"]
    assert all(error < 1e-4 for error in errors.values())
    assert read_manifest(tmp_path / "out")["options"]["verify"] == "numeric"


def test_stop_after(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints the graph behind the pass and writes nothing, be there an OUT or not."""
    monkeypatch.chdir(tmp_path)
    for out in ((), ("out",)):
        result = run("compile", MODEL, *out, "--stop-after", "pack-tokens")
        assert result.exit_code == 0, result.output
        assert result.stdout.rstrip("\n") == text_of(trace.after("pack-tokens"))
    assert list(tmp_path.iterdir()) == []


def test_stop_after_with_all_between(trace: Trace) -> None:
    """The last graph is printed once; times are of the passes that ran."""
    result = run("compile", MODEL, "--stop-after", "remove-noops", "--print-between-passes", "--time-passes")
    assert result.stdout.count(text_of(trace.after("remove-noops"))) == 1
    assert "time     remove-noops" in result.stdout
    assert "cse" not in result.stdout


def test_stop_after_lowering_prints_the_program() -> None:
    result = run("compile", MODEL, "--stop-after", "lower")
    assert result.stdout.startswith("program mixed\n")
    assert " at 0, alive" not in result.stdout


def test_inspect_graph(artifact: Path, trace: Trace) -> None:
    """Behind the summary, the last graph's text; with --after that of another; --all-layers unfolds."""
    short = run("inspect", artifact).stdout
    assert run("inspect", artifact, "--graph").stdout == f"{short}\n{text_of(trace.after())}\n"
    for name in ("capture", "select-logit-rows", "lower"):
        assert run("inspect", artifact, "--after", name).stdout == f"{short}\n{text_of(trace.after(name))}\n"
    every = run("inspect", artifact, "--after", "capture", "--all-layers").stdout
    assert every == f"{short}\n{text_of(trace.after('capture'), all_layers=True)}\n"


def test_the_users_lines_are_dimmed_on_a_terminal(
    artifact: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the mark on; without the colours the text is the same, and a line without a source has none."""
    monkeypatch.setattr("dllmc.cli.terminal.takes_colour", lambda stream: True)
    shown = CliRunner().invoke(main, ["inspect", str(artifact), "--graph"], color=True).stdout
    assert f"{COMMENT}" in shown
    for line in shown.splitlines():
        _, mark, source = line.partition("\x1b[2m")
        assert bool(mark) == (COMMENT in line)
        assert not mark or (source.startswith(COMMENT) and source.endswith("\x1b[0m"))
    assert click.unstyle(shown).endswith(text_of(trace.after()) + "\n")


def test_inspect_graph_json(artifact: Path, trace: Trace) -> None:
    """The calls, field by field; and, always, what there is to say of each pass."""
    document = json.loads(run("inspect", artifact, "--json", "--after", "capture").stdout)
    assert document["graph"] == [vars(call) for call in trace.graphs[0]]
    assert [entry["pass"] for entry in document["trace"]] == [entry.text for entry in trace.passes]
    index, entry = next((i, e) for i, e in enumerate(trace.passes) if e.modified)
    assert document["trace"][index] == {
        "pass": entry.text,
        "error": None,
        "notes": list(entry.notes),
        "calls_before": calls(trace.graphs[0]),
        "calls_after": calls(trace.graphs[1]),
        "written_bytes": sum(call.size_bytes for call in trace.graphs[1] if call.operator != "input"),
    }


def test_passes() -> None:
    """Every pass of the default pipeline in its order, with its summary, its facts and its options."""
    text = run("passes").stdout
    names = [line.split()[0] for line in text.splitlines() if not line.startswith(" ")]
    assert names == list(pipeline.REGISTRY)
    told = " ".join(text.split())
    for name in names:
        assert pipeline.lookup(name).summary() in told
    assert "requires packed; ensures rows-selected" in told


def test_passes_in_full() -> None:
    """The whole docstring of one, without the indentation of the source."""
    text = run("passes", "lower").stdout
    assert text.startswith("lower\n  One instruction a call, in the graph's order.\n\n  Case 1: ")
    assert text.endswith("  requires head-fused; ensures lowered\n  option device=cpu (str)\n")


def test_passes_json() -> None:
    """The documented fields, of all or of one."""
    documents = json.loads(run("passes", "--json").stdout)
    assert [document["name"] for document in documents] == list(pipeline.REGISTRY)
    one = json.loads(run("passes", "select-logit-rows", "--json").stdout)
    assert one in documents
    assert list(one) == ["name", "summary", "description", "requires", "ensures", "options"]
    assert (one["requires"], one["ensures"]) == (["packed"], ["rows-selected"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "MODEL", "--stop-after", "fuse-everything"), "no pass 'fuse-everything' to stop after"),
        (("compile", "MODEL", "out", "--json", "--print-between-passes"), "--json goes with none of"),
        (("compile", "MODEL", "out", "--json", "--time-passes"), "--json goes with none of"),
        (("compile", "MODEL", "--json", "--stop-after", "cse"), "--json goes with none of"),
        (("compile", "MODEL", "--html", "x.html", "--stop-after", "cse"), "which --stop-after does not make"),
        (("compile", "MODEL", "out", "--html", "."), "exists and is no file"),
        (
            ("inspect", "ARTIFACT", "--after", "fuse-everything"),
            "no pass 'fuse-everything' has run; choose from: capture",
        ),
        (("inspect", "ARTIFACT", "--html", "."), "exists and is no file"),
        (("inspect", "UNTRACED", "--graph"), "has no trace.json to show graphs from; compile the model again"),
        (("inspect", "UNTRACED", "--html", "x.html"), "has no trace.json to show graphs from"),
        (("passes", "fuse-everything"), "no pass is named 'fuse-everything'; choose from: inline-regions"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: tuple[str, ...], message: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing behind."""
    untraced = shutil.copytree(artifact, tmp_path / "untraced")
    (untraced / "trace.json").unlink()
    files = read_manifest(untraced)["files"]
    edit_manifest(untraced, files={name: entry for name, entry in files.items() if name != "trace.json"})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    known = {"MODEL": str(MODEL), "ARTIFACT": str(artifact), "UNTRACED": str(untraced)}
    result = run(*(known.get(a, a) for a in arguments))
    assert is_one_line(result), result.output
    assert message in result.stderr
    assert list(Path.cwd().iterdir()) == []

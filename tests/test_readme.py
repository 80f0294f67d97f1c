"""The README's examples, run as they stand: every console command and every line of Python, with their output."""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a reader would stand: the repository's examples, and nothing that was compiled before."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def console_examples() -> list[tuple[str, str]]:
    """(command, output) of every `$` line in the console blocks, in order, but those that set up the repository."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    found = [
        example for block in blocks for example in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    ]
    return [(command, output) for command, output in found if not command.startswith(("git ", "make "))]


def test_console(workplace: Path) -> None:
    """Each command prints exactly what the README shows."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    examples = console_examples()
    assert len(examples) >= 3
    for command, output in examples:
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(
            command,
            shell=True,
            cwd=workplace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.stdout == output, command


def test_python(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python session prints what the README shows, after the console's commands."""
    monkeypatch.chdir(workplace)
    sessions = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(sessions, {}, "README.md", "README.md", 0)
    assert len(test.examples) >= 5
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test).failed == 0


def table(section: str) -> list[str]:
    """The rows of a section's table, without its two header lines."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("|")][2:]


def figures() -> list[str]:
    """A row for every setting, number of requests and method in the results of benchmarks/decode_cpu.py."""
    rows = []
    for name in ("float32", "bfloat16", "long"):
        document = json.loads((ROOT / "benchmarks" / "results" / f"decode_cpu_{name}.json").read_text())
        setting = document["setting"]
        for r in document["results"]:
            baselines = r["of_dense"], r["of_dual_cache"]
            cells = (
                setting["dtype"],
                setting["prompt"],
                r["requests"],
                r["method"],
                f"{r['tokens_per_s']:.1f}",
                *("-" if ratios is None else f"{ratios['speedup']:.2f}x" for ratios in baselines),
                f"{r['memory_bytes'] / 2**20:.0f} MiB",
                f"{r['kv_bytes'] / 2**20:.0f} MiB" if r["kv_bytes"] else "-",
                *("-" if ratios is None else f"{ratios['same_tokens']:.0%}" for ratios in baselines),
            )
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def checkpoints() -> list[str]:
    """A row for each bundled checkpoint, from its training.json."""
    folders = ("tiny-llada", "tiny-llada-code")
    characters, code = (json.loads((ROOT / "examples" / name / "training.json").read_text()) for name in folders)
    achieved = (
        f"{characters['sudoku_right']:.1%} of Sudokus and {characters['add_right']:.1%} of sums right "
        f"({characters['examples_of_each']} each, dense greedy)",
        f"NLL {code['masked_nll']:.2f} nats a token masked at 15 %; a Kneser-Ney 5-gram model's is "
        f"{code['kneser_ney_5_gram_nll']:.2f}",
    )
    does = "4x4 Sudoku, sums of up to 4 digits (characters)", "Python source (BPE of 2,048 tokens)"
    return [
        f"| `examples/{name}` | {facts['parameters'] / 1e6:.1f} million | {what} | {figure} |"
        for name, facts, what, figure in zip(folders, (characters, code), does, achieved, strict=True)
    ]


def compile_times() -> list[str]:
    """A row for each depth in the results of benchmarks/compile_time.py."""
    records = json.loads((ROOT / "benchmarks" / "results" / "compile_time.json").read_text())["records"]
    return [
        f"| {r['layers']} | {r['seconds']:.1f} s | {r['capture_seconds']:.1f} s | {r['peak_bytes'] / 2**30:.2f} GiB | "
        f"{r['instructions']} | {r['arena_bytes'] / 2**20:.0f} MiB | {r['plan_seconds']:.2f} s |"
        for r in records
    ]


def heads() -> list[str]:
    """A row for each number of rows in the results of benchmarks/head_cpu.py: what the head costs of its product."""
    records = json.loads((ROOT / "benchmarks" / "results" / "head_cpu.json").read_text())["results"]
    costs = {(r["rows"], r["dtype"]): f"{r['of_gemm']:.2f}" for r in records}
    dtypes = ("float32", "bfloat16", "float16")
    return [
        f"| {rows} | {' | '.join(costs[rows, dtype] for dtype in dtypes)} |"
        for rows in dict.fromkeys(r for r, _ in costs)
    ]


def busy() -> list[str]:
    """A row for each number of busy processes in the results of benchmarks/busy_cpu.py."""
    records = json.loads((ROOT / "benchmarks" / "results" / "busy_cpu.json").read_text())["results"]
    times = {(r["busy_processes"], r["threads"]): f"{r['of_idle']:.2f}x" for r in records}
    return [
        f"| {count} | {' | '.join(times[count, threads] for threads in (None, 1, 'auto'))} |"
        for count in dict.fromkeys(count for count, _ in times)
    ]


def fused() -> list[str]:
    """A row for each fused operator in the results of benchmarks/fused_cpu.py: the range of its costs."""
    records = json.loads((ROOT / "benchmarks" / "results" / "fused_cpu.json").read_text())["results"]
    ranges: dict[tuple[str, str], list[float]] = {}
    for r in records:
        ranges.setdefault((r["op"], r["dtype"]), []).append(r["of_replaced"])
    cells = {key: f"{min(costs):.2f} to {max(costs):.2f}" for key, costs in ranges.items()}
    names = dict.fromkeys(op for op, _ in cells)
    return [f"| `{op}` | {cells[op, 'float32']} | {cells[op, 'bfloat16']} |" for op in names]


def contexts() -> list[str]:
    """A row for each model and decoder in the results of benchmarks/max_context.py, from the plan."""
    records = json.loads((ROOT / "benchmarks" / "results" / "max_context.json").read_text())["planned"]["results"]
    return [
        f"| {r['model']} | {r['decoder']} | {r['tokens']:,} | {r['bytes_a_token'] / 2**10:.1f} | {r['of_bound']:.1%} | "
        f"{r['dllmc_has_times']:.1f}x |"
        for r in records
    ]


def planned() -> list[str]:
    """A row for each instance in the results of benchmarks/minimalloc.py."""
    records = json.loads((ROOT / "benchmarks" / "results" / "minimalloc.json").read_text())["results"]
    assert all(r["solved"] for r in records)
    return [
        f"| {r['instance'].partition('.')[0]} | {r['buffers']} | {r['height'] / r['capacity']:.4f} | "
        f"{r['lower_bound'] / r['capacity']:.4f} | {r['seconds']:.2f} |"
        for r in records
    ]


def simulated() -> list[str]:
    """A row for each device and workload in the results of benchmarks/simulate.py: saturation, and load 0.9."""
    document = json.loads((ROOT / "benchmarks" / "results" / "simulate.json").read_text())

    def one(records: str, case: dict[str, Any], policy: str, **more: Any) -> dict[str, Any]:
        found: dict[str, Any]
        [found] = [r for r in document[records] if (case | {"policy": policy} | more).items() <= r.items()]
        return found

    rows = []
    for ratio in document["ratios"]:
        case = {key: ratio[key] for key in ("device", "workload")}
        rates = [one("saturation", case, policy)["requests_per_s"] for policy in ("multiplexed", "fcfs", "static")]
        loaded = [one("loads", case, policy, load=0.9) for policy in ("multiplexed", "fcfs")]
        loaded += [r for r in document["alone"] if case.items() <= r.items()]
        cells = (
            *case.values(),
            *(f"{rate:.2f}" for rate in rates),
            f"{ratio['saturation_of_static']:.2f}x",
            *(f"{r['p50_s']:.1f} s, {r['p99_s']:.1f} s" for r in loaded),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def served() -> list[str]:
    """A row for each workload in the results of benchmarks/serve_cpu.py: saturation, and load 0.9."""
    document = json.loads((ROOT / "benchmarks" / "results" / "serve_cpu.json").read_text())
    rates = {(r["workload"], r["policy"]): r["requests_per_s"] for r in document["saturation"]}
    loaded = {(r["workload"], r["policy"]): r for r in document["loads"] if r["load"] == 0.9}
    rows = []
    for name in dict.fromkeys(name for name, _ in rates):
        served = [rates[name, policy] for policy in ("multiplexed", "fcfs", "static")]
        latencies = [loaded[name, policy] for policy in ("multiplexed", "fcfs")]
        cells = (
            name,
            *(f"{rate:.1f}" for rate in served),
            f"{served[0] / served[2]:.2f}x",
            *(f"{r['p50_s']:.1f} s, {r['p99_s']:.1f} s" for r in latencies),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def packaged() -> list[str]:
    """A row for each step, and what runs it, in the results of benchmarks/aoti_memory.py."""
    document = json.loads((ROOT / "benchmarks" / "results" / "aoti_memory.json").read_text())
    ways = ("executor", "package", "package, glibc left alone", "eager")
    rows = []
    for step, result in document["result"].items():
        for way in ways:
            taken = result[way]["bytes"]
            rows.append(f"| {step} | {way} | {taken / 2**20:.0f} MiB | {taken / result['plan_bytes']:.2f}x |")
    return rows


def policies() -> list[str]:
    """A row for each policy in the results of benchmarks/cache_quality.py: differences to dense decoding."""
    tasks = json.loads((ROOT / "benchmarks" / "results" / "cache_quality.json").read_text())["tasks"]
    rows = []
    for each in zip(*(tasks[name]["results"] for name in ("code", "sudoku", "add")), strict=True):
        code, *answers = each
        name = "dense" if code["selection"] == "dense" else f"{code['selection']}, {code['retention']:g}"
        low, high = code["difference_interval"]
        cells = (
            name,
            f"{code['score']:.3f}",
            "" if name == "dense" else f"{code['difference']:+.4f} ({low:+.4f} to {high:+.4f})",
            *(f"{r['score']:.1%}" for r in answers),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_figures_are_the_benchmarks() -> None:
    """The tables have the rows that the results have, and no others."""
    assert table("First figures") == figures()
    assert table("What compiling takes") == compile_times()
    assert table("What the head costs") == heads()
    assert table("On a busy machine") == busy()
    assert table("What fusing saves") == fused()
    assert table("How long a sequence fits") == contexts()
    assert table("How good the plans are") == planned()
    assert table("Bundled checkpoints") == checkpoints()
    assert table("Many requests") == simulated()
    assert table("Many requests, served") == served()
    assert table("AOTInductor and TensorRT") == packaged()
    assert table("What caching costs") == policies()


def test_the_soak_is_the_benchmarks() -> None:
    """And it found nothing wrong."""
    result = json.loads((ROOT / "benchmarks" / "results" / "soak.json").read_text())["result"]
    assert result["wrong"] == []
    assert result["requests"] >= 10_000
    told = " ".join(README.split())
    counts = f"from {result['threads']} threads, with {result['preemptions']:,} preemptions and {result['cancelled']:,}"
    assert f"Of {result['requests']:,} random requests on one engine, {counts} cancelled" in told

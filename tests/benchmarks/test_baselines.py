"""The benchmarks' baselines against the golden data, and the benchmark scripts at sizes that take seconds."""

import json
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import baselines, decode_cpu, head_cpu, report
from benchmarks.baselines import Pace
from tests.golden.cases import Case, all_cases, load_model

ROOT = Path(__file__).parents[2]
FOLDERS = ("llada-mha", "dream-gqa")
DUAL_CACHE = {"delay": 0, "retention": 1.0, "selection": "per_head", "pool": 3}


def fits(case: Case) -> bool:
    """Whether the baselines can decode a case: greedy, low confidence, a uniform schedule, dense or dual cache."""
    kwargs = {"remasking": "low_confidence", **case.kwargs}
    plain = kwargs["remasking"] == "low_confidence" and not kwargs.keys() & {"schedule", "cfg_scale", "stop_token_ids"}
    return plain and case.cache in (None, DUAL_CACHE)


CASES = [case for case in all_cases() if fits(case)]


def decode(case: Case, prompts: list[list[int]]) -> baselines.Decoded:
    """Prompts of one length through the baseline that a case is for, at its pace."""
    model, spec = load_model(case.folder)
    pace = Pace(**{f.name: case.kwargs[f.name] for f in fields(Pace) if f.name in case.kwargs})
    decoder = baselines.dense if case.dense else baselines.dual_cache
    return decoder(model, torch.tensor(prompts), spec.mask_id, pace)


def test_every_published_case_is_covered() -> None:
    """All of LLaDA's own decoder, and of Fast-dLLM's with and without a threshold; and Dream's of either kind."""
    published = {"dense", "dense_threshold", "dual_cache", "dual_cache_threshold"}
    expected = [case.id for case in all_cases() if case.folder == FOLDERS[0] and case.name in published]
    assert {*expected} <= {case.id for case in CASES}
    assert len(expected) == 16
    assert {case.dense for case in CASES if case.folder == FOLDERS[1]} == {True, False}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_tokens(case: Case) -> None:
    """Tokens are exact, and so is the number of forward passes where the case gives it."""
    decoded = decode(case, [case.prompt_ids])
    assert decoded.tokens.tolist() == [case.completion]
    assert case.nfe in (None, decoded.forward_passes)


@pytest.mark.parametrize("name", ["dense", "dual_cache", "dense_threshold", "dual_cache_threshold"])
def test_batched_requests_decode_as_alone(name: str) -> None:
    """Two requests in a batch get the tokens that each gets alone; every block takes the passes of its slower one."""
    case = [case for case in CASES if case.name == name][-1]
    prompts = [case.prompt_ids, case.prompt_ids[::-1]]
    alone = [decode(case, [prompt]) for prompt in prompts]
    together = decode(case, prompts)
    assert together.tokens.tolist() == [row for decoded in alone for row in decoded.tokens.tolist()]
    passes = [decoded.forward_passes for decoded in alone]
    assert max(passes) <= together.forward_passes < sum(passes)


@pytest.fixture
def tiny_run(tmp_path: Path) -> list[str]:
    """Arguments of `decode_cpu` for a run of seconds, without the file to write."""
    sizes = {"vocab": 300, "hidden": 32, "layers": 2, "heads": 2, "mlp": 48, "prompt": 20, "new": 16, "block": 8}
    options = {**sizes, "steps": 8, "repeats": 1}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_decode_benchmark(tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method is measured at every number of requests, in as many passes; tokens are those of its reference.

    KV bytes are of the pages that all requests' kept keys take: 28 or 14 keys a head are a page of 32.
    """
    monkeypatch.setattr(decode_cpu, "in_fresh_process", lambda _, function, *args: function(*args))
    out = tmp_path / "decode.json"
    done = CliRunner().invoke(decode_cpu.main, [*tiny_run, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    records = {(r["requests"], r["method"]): r for r in json.loads(out.read_text())["results"]}
    baselines = ("dense", "dense, float32 softmax", "dual cache")
    methods = (*baselines, "dllmc dense", "dllmc cached", "dllmc cached, half")
    assert [*records] == [(requests, method) for requests in (1, 4) for method in methods]
    for (requests, method), r in records.items():
        assert r["forward_passes"] == 8
        assert r["tokens_per_s"] == requests * 16 / r["runs"][0]["seconds"]
        assert r["of_dense"]["same_tokens"] == 1 or method != "dllmc dense"
        assert r["of_dual_cache"]["same_tokens"] == 1 or method != "dllmc cached"
        assert r["kv_bytes"] == (
            0 if method in baselines else 2 * 2 * 32 * 32 * 4 * (requests if "cached" in method else 1)
        )
    assert not any(place in out.read_text() for place in (str(ROOT), str(Path.home()), str(tmp_path)))


@pytest.mark.slow
def test_decode_benchmark_in_fresh_processes(tiny_run: list[str], tmp_path: Path) -> None:
    """As its users call it: each measurement in a process of its own, and memory of each."""
    out = tmp_path / "decode.json"
    command = [sys.executable, "-m", "benchmarks.decode_cpu", *tiny_run, "--requests", "2"]
    command += ["--method", "dense", "--method", "dllmc cached, half"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    records = json.loads(out.read_text())["results"]
    assert [(r["method"], r["requests"]) for r in records] == [("dense", 2), ("dllmc cached, half", 2)]
    assert all(r["of_dual_cache"] is None for r in records)
    assert all(r["memory_bytes"] > 0 for r in records)
    assert all(r["method"] in done.stdout for r in records)


@pytest.mark.parametrize(("reference", "method"), [("dense", "dllmc dense"), ("dual cache", "dllmc cached")])
def test_decode_benchmark_refuses_other_tokens(
    reference: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, dllmc's tokens must be those of its reference in every run: else it fails and writes nothing."""

    def runs(*last_tokens: int) -> list[decode_cpu.Measurement]:
        return [decode_cpu.Measurement([[7, 8, 9, last]], 4, 1.0, 2**20, 0, 0, 2**30, "VmHWM") for last in last_tokens]

    measured = {(1, reference): runs(5, 5, 5), (1, method): runs(5, 6, 5)}
    monkeypatch.setattr(decode_cpu, "measure_all", lambda *_: measured)
    done = CliRunner().invoke(decode_cpu.main, ["--out", str(tmp_path / "decode.json")])
    assert done.exit_code == 1
    assert "other tokens" in done.output
    assert "91.7%" in done.output
    assert not (tmp_path / "decode.json").exists()


def test_head_benchmark(tmp_path: Path) -> None:
    """A tiny run has a record for every dtype and number of rows, with the ratios of its medians."""
    out = tmp_path / "head.json"
    arguments = ["--vocab", "3000", "--hidden", "16", "--rows", "1", "--rows", "5", "--repeats", "3", "--out", str(out)]
    done = CliRunner().invoke(head_cpu.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    records = json.loads(out.read_text())["results"]
    dtypes = ("float32", "bfloat16", "float16")
    assert [(r["dtype"], r["rows"]) for r in records] == [(dtype, rows) for dtype in dtypes for rows in (1, 5)]
    for r in records:
        head, gemm = (sorted(r["runs_ms"][name])[1] for name in ("head", "whole"))
        assert (r["head_ms"], r["gemm_ms"], r["of_gemm"]) == (head, gemm, head / gemm)
        assert r["native"] or r["dtype"] != "float32"


@pytest.mark.parametrize("resettable", [True, False])
def test_peak_memory_sees_what_is_gone_again(resettable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB that lived for a moment are in the peak, and an older, higher peak is not; also where it is sampled."""
    if not resettable:

        def refuse(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr(Path, "write_text", refuse)
    size = 64 << 20
    torch.ones(4 * size, dtype=torch.uint8)
    with report.PeakMemory() as memory:
        block = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.1)
        del block
    assert memory.by.startswith("VmHWM" if resettable else "VmRSS")
    assert size <= memory.peak - memory.start + (1 << 20) < 2 * size

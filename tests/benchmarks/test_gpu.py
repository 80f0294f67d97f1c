"""`benchmarks/gpu`, as far as a CPU goes: all sections on a tiny model, and what a step must do, counted by hand."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import dllmc
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bound, models
from benchmarks.gpu.bound import NAMES
from benchmarks.gpu.decode import TimedOut, at_most
from benchmarks.gpu.models import MODELS, Limits
from benchmarks.gpu.record import Section
from benchmarks.gpu.setting import setting_of
from benchmarks.gpu.work import Work, work_of
from dllmc.runtime import batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model's programs."""
    folder = tmp_path_factory.mktemp("programs")
    setting_of("llada-8b", CPU, "small", (), None, None).compiled(folder)
    return folder


def run(programs: Path, out: Path, *options: str) -> dict[str, Any]:
    """The sections that a small run on the CPU writes, in this process."""
    given = ["--small", "--device", "cpu", "--alone", "--programs", str(programs), "--out", str(out), *options]
    done = CliRunner().invoke(command.main, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    sections: dict[str, Any] = json.loads(out.read_text())["sections"]
    assert all(section["complete"] for section in sections.values())
    return sections


def test_kernels(programs: Path, tmp_path: Path) -> None:
    """Every operator is right, and beside what torch takes."""
    [section] = run(programs, tmp_path / "out.json", "--only", "kernels").values()
    assert {r["op"].split(".")[1] for r in section["results"]} == {
        "decode_head",
        "attention",
        "keep",
        "add_rms_norm",
        "rope",
        "glu",
        "linear",
    }
    for r in section["results"]:
        assert r["error"] < 1e-5
        assert r["of_roofline"] == pytest.approx(
            max(r["flops"] / section["ceilings"]["flops_per_s"], r["bytes"] / section["ceilings"]["bytes_per_s"])
            / r["seconds"]
        )
        assert all(rival["speedup"] > 0 for rival in r["rivals"].values())


def test_steps_and_memory(programs: Path, tmp_path: Path) -> None:
    """Both phases at both numbers of requests; each call is in one part; sections share the file."""
    sections = run(programs, tmp_path / "out.json", "--only", "where", "--only", "memory")
    results = sections["where"]["results"]
    assert [(r["phase"], r["requests"]) for r in results] == [
        (phase, requests) for requests in (1, 3) for phase in ("refresh", "reuse")
    ]
    for r in results:
        assert [*r["parts"]] == [*NAMES]
        assert sum(part["calls"] for part in r["parts"].values()) == r["calls"]
        assert sum(part["flops"] for part in r["parts"].values()) == r["flops"] > 0
        assert r["roofline_of_step_seconds"] <= r["roofline_of_calls_seconds"] * (1 + 1e-9)  # sums round
        assert (r["parts"]["keep"]["calls"] > 0) == (r["phase"] == "refresh")
    [engine] = [r for r in sections["memory"]["results"] if r["what"] == "engine"]
    assert engine["planned_bytes"]["total"] > 0
    assert engine["measured_bytes"] is None  # the CPU's allocator does not count


@pytest.mark.slow
def test_decoding(programs: Path, tmp_path: Path) -> None:
    """Contenders decode the same tokens where they compute the same, as many in as many passes."""
    [section] = run(programs, tmp_path / "out.json", "--only", "decode", "--no-compiled").values()
    results = {(r["requests"], r["contender"]): r for r in section["results"]}
    contenders = ("eager dense", "eager dual cache", *(name for name in _policies()))
    assert {*results} == {(requests, name) for requests in (1, 3) for name in contenders}
    for (requests, name), r in results.items():
        assert r["passes"] == 8
        assert r["tokens_per_s"] == pytest.approx(requests * 16 / r["seconds"])
        assert r["request_seconds"]["longest"] <= r["seconds"]
        assert r.get("same_tokens") == (1 if name in ("dllmc dense", "dllmc cached") else None)


def _policies() -> list[str]:
    return ["dllmc dense", "dllmc cached", "dllmc cached, half", "dllmc cached, quarter"]


def test_a_failure_is_a_record(tmp_path: Path) -> None:
    """It says what it was, what else was measured stays, and what cannot end in time is not begun."""

    def fails() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 67.15 GiB.\nmore")

    section = Section(tmp_path / "out.json", "decode", {"size": "small"}, budget_s=60)
    section.attempt({"n": 1}, fails)
    section.attempt({"n": 2}, lambda: {"seconds": 1.0})
    section.attempt({"n": 3}, lambda: {"seconds": 2.0}, expected_s=1e6)
    Section(tmp_path / "out.json", "kernels", {}, budget_s=60).close()
    sections = json.loads((tmp_path / "out.json").read_text())["sections"]
    first, second, third = sections["decode"]["results"]
    assert first == {"n": 1, "out_of_memory": "OutOfMemoryError: CUDA out of memory. Tried to allocate 67.15 GiB."}
    assert second == {"n": 2, "seconds": 1.0}
    assert "1000000 s expected" in third["not_measured"]
    assert (sections["decode"]["complete"], sections["kernels"]["complete"]) == (False, True)


def test_a_compiler_is_stopped() -> None:
    with pytest.raises(TimedOut), at_most(0.05):
        time.sleep(5)
    with at_most(0.05):
        pass
    time.sleep(0.06)  # nothing is left that would ring


def test_sections_are_taken_off_the_options() -> None:
    assert command._without_sections(["--only", "kernels", "--quick", "--only=memory"]) == ["--quick"]


def test_work_of_calls_by_hand() -> None:
    """Each operand counts once; of tables what is looked up, of caches what segments have."""
    x, weight = torch.zeros(6, 8), torch.zeros(10, 8)
    assert work_of("aten.linear.default", [x, weight, None], [torch.zeros(6, 10)]) == Work(
        2 * 6 * 8 * 10, 4 * (6 * 8 + 10 * 8 + 6 * 10)
    )
    assert work_of("dllmc.glu.default", [x, x, "silu"], [x]) == Work(0, 4 * 3 * 48)
    assert work_of("copy", [torch.zeros(1, 8).expand(6, 8)], [x]) == Work(0, 4 * (8 + 48))  # repeated, read once
    ids = torch.zeros(6, dtype=torch.int64)
    assert work_of("aten.embedding.default", [weight, ids], [x]) == Work(0, 2 * 4 * 48 + 8 * 6)
    heads, table = torch.zeros(6, 2, 4), torch.zeros(100, 4)
    assert work_of("dllmc.rope.default", [heads, table, table, ids], [heads]) == Work(0, 4 * (2 * 48 + 2 * 24) + 8 * 6)


def test_work_of_attention_by_hand() -> None:
    """Two query heads to a KV head; the second segment queries two of its four tokens, and sees 5 cached slots."""
    q, k = torch.zeros(5, 4, 8), torch.zeros(7, 2, 8)
    spans, segments = torch.tensor([[0, 3], [3, 5]]), torch.tensor([[0, 3], [3, 7]])
    cache, table = torch.zeros(2, 2, 9, 4, 8), torch.zeros(2, 3, dtype=torch.int64)
    args = [q, k, k, spans, segments, 1.0, None, 0, cache, torch.tensor([0, 5]), table]
    pairs = 3 * 3 + 2 * (4 + 5)
    moved = 4 * (2 * q.numel() + 2 * k.numel() + 2 * 5 * 2 * 8)
    assert work_of("dllmc.attention.default", args, [q]) == Work(4 * pairs * 4 * 8, moved)
    # the last query of the second segment alone; then with a window that shows it its neighbours
    assert work_of("dllmc.attention.default", [q[:1], *args[1:6], None, 4], [q[:1]]).flops == 4 * 4 * 4 * 8
    assert work_of("dllmc.attention.default", [q[:3], k, k, spans[:1], segments[:1], 1.0, 1], [q[:3]]).flops == (
        4 * (2 + 3 + 2) * 4 * 8
    )


def test_work_of_keep_by_hand() -> None:
    """6 candidates, of which 4 stay: keys are read to score, then keys and values are read and written."""
    q, k = torch.zeros(2, 4, 8), torch.zeros(8, 2, 8)
    cache, table = torch.zeros(2, 2, 9, 4, 8), torch.zeros(1, 3, dtype=torch.int64)

    def work(kept: int) -> Work:
        keeping = torch.tensor([[2, 4, kept, 0, 1]])
        return work_of("dllmc.keep.default", [cache, q, k, k, torch.tensor([[0, 8]]), keeping, table], [cache])

    key = 4 * 2 * 8
    assert work(4) == Work(2 * 6 * 4 * 8, 4 * q.numel() + 6 * key + 4 * 4 * key)
    assert work(6) == Work(0, 4 * 6 * key)


def test_work_of_a_program_by_hand(programs: Path) -> None:
    """A dense step of 10 tokens and 8 rows: products of all layers, of attention and of the head."""
    s = setting_of("llada-8b", CPU, "small", (), None, None)
    made, m = s.compiled(programs), MODELS["tiny"]
    engine = models.engine_of(made, made.joined(models.random_tensors(m, 2, s.dtype, CPU), CPU), CPU, s.pages)
    seen: list[batch.Batch] = []
    compose = batch.compose
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batch, "compose", lambda *args: seen.append(compose(*args)) or seen[-1])
        engine.generate([[1, 2]], dllmc.SamplingParams(gen_length=8, block_length=8, steps=1, ignore_eos=True))
    [step] = seen
    program = engine.artifact.programs["dense"]
    with torch.inference_mode():
        bound.load(program, engine.memory, step.sizes, step.inputs)
        calls = bound.bind(program, engine.memory, step.sizes)
        works = {name: Work() for name in NAMES}
        for call in calls:
            works[bound.group_of(call.op)] += call.work()
            call.run()
    width, mlp, tokens, rows = 64, 96, 10, 8
    whole = 2 * tokens * (4 * width * width + 3 * width * mlp)
    last = 2 * tokens * 2 * width * width + 2 * rows * (2 * width * width + 3 * width * mlp)  # K and V of all tokens
    assert works["GEMM"].flops == whole + last
    assert works["attention"].flops == 4 * (tokens * tokens + rows * tokens) * width
    assert works["head"].flops == 2 * rows * width * 512
    assert works["norms, rope, glu"].flops == 0 < works["norms, rope, glu"].bytes


def test_kept_programs_are_those_compiled(tmp_path: Path) -> None:
    limits = Limits(tokens=64, requests=2, rows=16)
    given = (MODELS["tiny"], 1, limits, torch.float32, CPU)
    first, again = models.kept(tmp_path, *given), models.kept(tmp_path, *given)
    assert first.programs == again.programs
    assert first.recipes == again.recipes
    assert all(torch.equal(value, again.constants[name]) for name, value in first.constants.items())


def test_programs_are_prepared_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    given = ["--small", "--device", "cuda", "--only", "prepare"]
    done = CliRunner().invoke(command.main, [*given, "--programs", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    [place] = tmp_path.iterdir()
    assert place.name.endswith("bfloat16-cuda")
    assert "--programs" in CliRunner().invoke(command.main, given).output


def test_shapes_of_published_models() -> None:
    """Bytes of a token's keys and values in bfloat16."""
    assert MODELS["llada-8b"].token_kv_bytes(32, torch.bfloat16) == 512 * 1024
    assert MODELS["dream-7b"].token_kv_bytes(28, torch.bfloat16) == 56 * 1024
    s = setting_of("llada-8b", CPU, "default", (), None, None)
    assert s.limits == Limits(64 * 576, 64, 2048)
    assert s.pages == 64 * math.ceil(544 / 32)

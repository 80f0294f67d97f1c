"""Artifacts as ONNX models: golden tokens in onnxruntime, sizes that were never seen, and nothing but the standard."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dllmc
from dllmc import artifact
from dllmc.errors import ExportError
from dllmc.export.onnx import export
from dllmc.export.onnx.graph import DOMAIN, OPSET
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from dllmc.runtime.params import DENSE
from tests.artifacts import tree, write
from tests.export.sessions import Sessions, engine_of
from tests.golden.cases import FOLDERS, Case, all_cases, load_model
from tests.golden.test_engine import completions, policy

OPTIONS = dllmc.CompileOptions(max_tokens_per_step=512, max_requests=4, max_logit_rows=128)


@dataclass(frozen=True)
class Exported:
    """An artifact and its export."""

    artifact: Path
    onnx: Path


Make = Callable[..., Exported]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Compile and export one of the golden models, once for each way of doing so."""
    made: dict[object, Exported] = {}

    def of(folder: str, keep_custom_ops: bool = False, logits: bool = False, **options: Any) -> Exported:
        key = folder, keep_custom_ops, logits, *sorted(options.items())
        if key not in made:
            model, spec = load_model(folder)
            path = tmp_path_factory.mktemp("onnx")
            chosen = dllmc.CompileOptions(**{**vars(OPTIONS), **options})
            written = dllmc.compile(model, path / "artifact", chosen, spec)
            export(written, path / "onnx", logits=logits, keep_custom_ops=keep_custom_ops)
            made[key] = Exported(path / "artifact", path / "onnx")
        return made[key]

    return of


@pytest.fixture(scope="session")
def engines(make: Make) -> Callable[[str], dllmc.Engine]:
    """Engines whose steps run in onnxruntime."""
    loaded: dict[str, dllmc.Engine] = {}

    def of(folder: str) -> dllmc.Engine:
        if folder not in loaded:
            exported = make(folder)
            loaded[folder] = engine_of(exported.artifact, exported.onnx)
        return loaded[folder]

    return of


# Every other one in `make test`.
CASES = [
    pytest.param(case, id=str(case), marks=[pytest.mark.slow] if number % 2 else [])
    for number, case in enumerate(all_cases())
]


@pytest.mark.parametrize("case", CASES)
def test_golden(case: Case, engines: Callable[[str], dllmc.Engine]) -> None:
    """Dense and cached: exact tokens, in as many steps."""
    engine = engines(case.folder)
    [result] = engine.generate([case.prompt_ids], dllmc.SamplingParams(**case.kwargs), policy(case))
    assert result.token_ids in completions(case)
    assert case.nfe in (None, result.forward_passes)


@pytest.mark.parametrize("folder", FOLDERS)
def test_several_requests_share_a_step(folder: str, engines: Callable[[str], dllmc.Engine]) -> None:
    """Dense ones, guided and not, greedy and sampled: a model takes any number of segments."""
    cases = [case for case in all_cases() if case.folder == folder and case.dense][:6]
    engine = engines(folder)
    results = engine.generate([c.prompt_ids for c in cases], [dllmc.SamplingParams(**c.kwargs) for c in cases], DENSE)
    assert all(result.token_ids in completions(case) for result, case in zip(results, cases, strict=True))


PARAMS = [
    {"temperature": 0.8, "seed": 11},
    {"temperature": 1.2, "seed": -3, "top_k": 5, "remasking": "entropy"},
    {"temperature": 0.7, "seed": 2**40, "top_p": 0.8, "remasking": "topk_margin"},
    {"temperature": 1.0, "seed": 7, "top_k": 20, "top_p": 0.9, "cfg_scale": 1.0},
    {"remasking": "random", "seed": 5, "suppress_tokens": (1, 2, 3)},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("cache", [None, dllmc.CachePolicy(retention=0.4)], ids=["dense", "cached"])
def test_sampled(params: dict[str, Any], cache: dllmc.CachePolicy | None, make: Make) -> None:
    """Every way to sample, as the engine does it itself: the noise is keyed, so that it is the same anywhere."""
    exported = make("llada-mha")
    theirs, ours = engine_of(exported.artifact, exported.onnx), dllmc.load(exported.artifact)
    sampling = dllmc.SamplingParams(gen_length=16, block_length=8, steps=8, ignore_eos=True, **params)
    prompt = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]
    found, wanted = (engine.generate([prompt], sampling, cache)[0] for engine in (theirs, ours))
    assert found.token_ids == wanted.token_ids


def step_of(lengths: list[int], rows: list[int], seed: int) -> dict[str, np.ndarray]:
    """Inputs of a dense step of random tokens: so many a segment, and so many rows of each."""
    draw = np.random.default_rng(seed)
    ends = np.cumsum(lengths)
    starts, row_ends = ends - lengths, np.cumsum(rows)
    picked = [np.sort(draw.choice(n, count, replace=False)) for n, count in zip(lengths, rows, strict=True)]
    segments, total = len(lengths), int(row_ends[-1])
    return {
        "token_ids": draw.integers(0, 500, ends[-1]),
        "positions": np.concatenate([np.arange(n) for n in lengths]),
        "segments": np.stack((starts, ends), 1),
        "rows": np.concatenate([start + own for start, own in zip(starts, picked, strict=True)]),
        "row_spans": np.stack((row_ends - rows, row_ends), 1),
        "guided": np.zeros(0, np.int64),
        "guidance": np.zeros(0, np.float32),
        "row_segment": np.repeat(np.arange(segments), rows),
        "row_position": np.concatenate(picked),
        "row_target": np.full(total, -1),
        "temperature": np.zeros(segments, np.float32),
        "top_p": np.ones(segments, np.float32),
        **{name: np.zeros(segments, np.int64) for name in ("top_k", "confidence_rule", "seed", "step")},
        "suppressed": np.full((segments, 64), -1),
    }


def exact_logits(folder: str, inputs: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Of each row, from the float64 model, one sequence at a time."""
    model, spec = load_model(folder)
    found = []
    with torch.no_grad():
        for (start, end), (first, behind) in zip(inputs["segments"], inputs["row_spans"], strict=True):
            logits = model.double()(torch.from_numpy(inputs["token_ids"][start:end])[None])[0]
            position = torch.from_numpy(inputs["row_position"][first:behind])
            found.append(logits[(position - 1).clamp_min(0) if spec.shifted else position])
    model.float()
    return torch.cat(found)


@settings(deadline=None, derandomize=True, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("folder", FOLDERS)
def test_any_lengths(folder: str, data: st.DataObject, make: Make) -> None:
    """Nothing was traced: steps of any tokens, segments and rows give the float64 model's logits and best tokens."""
    lengths = data.draw(st.lists(st.integers(1, 97), min_size=1, max_size=4))
    rows = [data.draw(st.integers(1, n)) for n in lengths]
    inputs = step_of(lengths, rows, seed=sum(lengths))
    sessions = Sessions(make(folder, logits=True).onnx, pages=1)
    found = sessions.run("dense", inputs)
    wanted = exact_logits(folder, inputs)
    np.testing.assert_allclose(found["logits"], wanted.numpy(), rtol=2e-4, atol=2e-4)
    top = wanted.topk(2).values
    clear = (top[:, 0] - top[:, 1] > 1e-3).numpy()
    assert (found["token"] == wanted.argmax(1).numpy())[clear].all()


@pytest.mark.parametrize("length", [37, 101, 203])
def test_lengths_of_refresh_and_reuse(length: int, make: Make) -> None:
    """Three lengths, caches of three sizes; the engine itself decodes the same."""
    exported = make("dream-gqa")
    params = dllmc.SamplingParams(gen_length=24, block_length=12, steps=8, ignore_eos=True)
    prompt = np.random.default_rng(length).integers(5, 400, length).tolist()
    engines = engine_of(exported.artifact, exported.onnx), dllmc.load(exported.artifact)
    cache = dllmc.CachePolicy(retention=0.5, delay=1, refresh_interval=3)
    found, wanted = (engine.generate([prompt], params, cache)[0].token_ids for engine in engines)
    assert found == wanted


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of graphs within nodes too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("phase", ["dense", "refresh", "reuse"])
def test_standard_operators_only_and_no_logits(folder: str, phase: str, make: Make) -> None:
    """Of the opset that is stated; no result, of however deep a graph, is as wide as the vocabulary."""
    model = onnx.load(make(folder).onnx / f"{phase}.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert OPSET >= 23
    assert {node.domain for node in nodes(model.graph)} == {""}
    assert not model.functions
    vocab = load_model(folder)[1].vocab_size
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert not (len(dims) > 1 and dims[-1] == vocab), value.name
    caches = [value.name for value in model.graph.input if value.name.startswith("cache.")]
    updated = [value.name for value in model.graph.output if value.name.endswith(".updated")]
    assert bool(caches) == (phase != "dense")
    assert updated == ([f"{name}.updated" for name in caches] if phase == "refresh" else [])


def test_weights_are_one_file_within_the_directory(make: Make) -> None:
    exported = make("llada-mha").onnx
    weights = artifact.read(make("llada-mha").artifact).load_weights()
    content = (exported / "weights.bin").read_bytes()
    for phase in ("dense", "refresh", "reuse"):
        model = onnx.load(exported / f"{phase}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "weights.bin"
            start = int(place["offset"])
            assert start % 64 == 0
            assert content[start : start + int(place["length"])] == weights[tensor.name].numpy().tobytes()
    assert sorted(os.listdir(exported)) == ["dense.onnx", "model.json", "refresh.onnx", "reuse.onnx", "weights.bin"]


def test_custom_operators_with_function_bodies(make: Make) -> None:
    """Operators of dllmc's domain are single nodes, and a runtime that has no kernels for them computes the same."""
    plain, custom = make("dream-gqa"), make("dream-gqa", keep_custom_ops=True)
    for phase in ("dense", "refresh", "reuse"):
        model = onnx.load(custom.onnx / f"{phase}.onnx", load_external_data=False)
        called = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
        assert called == {function.name for function in model.functions}
        assert {"attention", "decode_head", "rope"} <= {name.rstrip("_0123456789") for name in called}
        assert ("keep" in called) == (phase == "refresh")
    params = dllmc.SamplingParams(gen_length=16, block_length=8, ignore_eos=True)
    engines = [engine_of(each.artifact, each.onnx) for each in (plain, custom)]
    for cache in (None, dllmc.CachePolicy(retention=0.5)):
        found = [engine.generate([[5, 9, 200, 77, 31]], params, cache)[0].token_ids for engine in engines]
        assert found[0] == found[1]


def test_loops_run_at_once(make: Make) -> None:
    """An artifact of a small budget, whose programs work on a few rows at a time, decodes the same."""
    total = artifact.read(make("llada-mha").artifact).memory["total"]
    exported = make("llada-mha", memory_budget=int(total * 0.8), max_logit_rows=64, max_tokens_per_step=256)
    programs = artifact.read(exported.artifact).programs
    assert any("chunk" in program.maxima for program in programs.values())
    cases = [case for case in all_cases() if case.folder == "llada-mha"][:40:8]
    engine = engine_of(exported.artifact, exported.onnx)
    for case in cases:
        [result] = engine.generate([case.prompt_ids], dllmc.SamplingParams(**case.kwargs), policy(case))
        assert result.token_ids in completions(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Float16 runs in onnxruntime, close to float64; bfloat16, which it does not run on a CPU, is valid ONNX."""
    config = {"d_model": 32, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 48, "vocab_size": 60, "rope": True}
    torch.manual_seed(0)
    model = LLaDAModel(LLaDAConfig.from_dict({**config, "max_sequence_length": 64})).to(dtype).eval()
    spec = dllmc.ModelSpec(vocab_size=60, mask_id=59, end_ids=(0,), max_positions=64)
    options = dllmc.CompileOptions(max_tokens_per_step=64, max_requests=2, max_logit_rows=16)
    written = dllmc.compile(model, tmp_path / "artifact", options, spec)
    files = export(written, tmp_path / "onnx", logits=True).files
    assert {"dense.onnx", "refresh.onnx", "reuse.onnx"} <= files.keys()
    if dtype == torch.float16:
        inputs = step_of([19, 30], [4, 7], seed=1)
        inputs["token_ids"] %= 60
        found = Sessions(tmp_path / "onnx", pages=1).run("dense", inputs)["logits"]
        double = model.double()
        with torch.no_grad():
            ids = torch.from_numpy(inputs["token_ids"])
            wanted = torch.cat([double(ids[None, a:b])[0] for a, b in inputs["segments"]])[inputs["rows"]]
        assert np.abs(found - wanted.numpy()).max() < 0.02 * wanted.abs().max()


def test_the_same_artifact_gives_the_same_bytes(make: Make, tmp_path: Path) -> None:
    exported = make("llada-mha")
    export(artifact.read(exported.artifact), tmp_path / "again")
    assert tree(tmp_path / "again") == tree(exported.onnx)


def test_only_an_export_is_replaced(make: Make, tmp_path: Path) -> None:
    opened = artifact.read(make("llada-mha").artifact)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(dllmc.errors.ArtifactError, match="exists and is no ONNX export; choose another"):
        export(opened, out)
    (out / "model.json").unlink()
    out.rmdir()
    export(opened, out)
    (out / "old").write_text("")
    export(opened, out)
    assert "old" not in os.listdir(out)


def test_a_program_that_returns_nothing_to_decode_is_exported_all_the_same(tmp_path: Path) -> None:
    """Two copies of a weight: views of whole tensors need no operator at all."""
    written = write(tmp_path / "artifact")
    export(written, tmp_path / "onnx")
    found = Sessions(tmp_path / "onnx", pages=1).run("dense", {"ids": np.zeros(3, np.int64)})
    np.testing.assert_array_equal(found["%b"], np.arange(6.0).reshape(2, 3))


def test_without_the_package(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ExportError, match=r"written by the package onnx; pip install 'dllmc\[onnx\]'"):
        export(artifact.read(make("llada-mha").artifact), tmp_path / "out")

"""What it means that an artifact is for a device: its workspaces, what is written, and where it can be loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import dllmc
from dllmc.errors import ArtifactError, ConfigError, DeviceError, PassError, ProgramError
from dllmc.ir.program import DEVICES, Program
from dllmc.ir.program_json import from_json, to_json
from dllmc.ops import attention, decode_head, keep
from dllmc.ops.registry import OPERATORS
from dllmc.passes import pipeline
from dllmc.passes.lower import Lower
from dllmc.runtime import device as devices
from tests.artifacts import rehash
from tests.golden.cases import ROOT

SMALL = {"max_tokens_per_step": 128, "max_requests": 4, "max_logit_rows": 16}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same checkpoint for either device."""
    out = tmp_path_factory.mktemp("devices")
    return {
        device: dllmc.compile(ROOT / "llada-mha", out / device, dllmc.CompileOptions(**SMALL, device=device)).path
        for device in DEVICES
    }


def test_a_program_keeps_its_device(compiled: dict[str, Path]) -> None:
    """Every phase has it; that of a CPU is not spelled out, so programs for a CPU are what they were."""
    for device, path in compiled.items():
        artifact = dllmc.load(path, "cpu").artifact
        assert artifact.device == device
        assert {program.device for program in artifact.programs.values()} == {device}
        for program in artifact.programs.values():
            document = to_json(program)
            assert ("device" in document) == (device != "cpu")
            assert from_json(document, "x") == program


def test_an_unknown_device_is_refused(compiled: dict[str, Path]) -> None:
    """In options, in a pipeline, in a program's file."""
    with pytest.raises(ConfigError, match="device: expected one of cpu, cuda, found 'tpu'"):
        dllmc.CompileOptions(device="tpu")
    with pytest.raises(PassError, match="device: expected one of cpu, cuda, found 'tpu'"):
        dllmc.compile(
            ROOT / "llada-mha",
            compiled["cpu"].parent / "none",
            dllmc.CompileOptions(passes=pipeline.DEFAULT_PIPELINE.replace("lower", "lower{device=tpu}")),
        )
    document = json.loads((compiled["cuda"] / "programs" / "dense.json").read_text())
    for wrong in ("tpu", 1, None):
        with pytest.raises(ProgramError, match=r"^x: device: expected one of cpu, cuda"):
            from_json({**document, "device": wrong}, "x")


def test_the_pipeline_is_told_of_the_device() -> None:
    """So that its text alone makes the same program; a pipeline that says it itself is left alone."""
    assert Lower("cuda") in dllmc.CompileOptions(device="cuda").pipeline
    assert Lower("cuda") in dllmc.CompileOptions(device="cuda", memory_budget=1).pipeline
    assert Lower("cuda") in dllmc.CompileOptions(passes="lower{device=cuda},plan-memory").pipeline
    assert Lower() in dllmc.CompileOptions().pipeline


def test_only_a_gpu_has_the_workspaces_of_a_gpu(compiled: dict[str, Path]) -> None:
    """A CPU's attention and keep need none; nor does it hold what a GPU knows of requests."""
    cpu, cuda = (dllmc.load(compiled[device], "cpu").artifact for device in DEVICES)
    assert cpu.memory["arena"] <= cuda.memory["arena"]
    assert cpu.memory["weights"] == cuda.memory["weights"]
    assert cpu.memory["state"] + cuda.program.place_bytes == cuda.memory["state"]

    def with_workspace(program: Program) -> set[str]:
        return {call.op for call, _ in program.calls() if call.workspace is not None}

    gpu_alone = {"dllmc.attention.default", "dllmc.keep.default"}
    assert with_workspace(cuda.program) - with_workspace(cpu.program) == gpu_alone


def test_what_is_for_cuda_suffices_on_a_cpu() -> None:
    """Of each operator that tells the devices apart."""
    told_apart = {attention.workspace_of, keep.workspace_of, decode_head.workspace_of}
    assert told_apart <= {op.workspace_bytes for op in OPERATORS.values()}
    hidden, weight = torch.empty(7, 16, device="meta"), torch.empty(300, 16, device="meta")
    assert decode_head.workspace_of([hidden, weight], "cuda") >= decode_head.workspace_of([hidden, weight], "cpu") > 0


def test_a_cpu_decodes_what_is_for_cuda(compiled: dict[str, Path]) -> None:
    params = dllmc.SamplingParams(gen_length=12, block_length=6, ignore_eos=True)
    found, expected = (
        dllmc.load(compiled[device], "cpu").generate([[1, 2, 3], [4, 5]], params, dllmc.CachePolicy(retention=0.5))
        for device in ("cuda", "cpu")
    )
    assert found == expected


def test_programs_for_several_devices_are_refused(compiled: dict[str, Path], tmp_path: Path) -> None:
    """Their workspaces would be planned for one and used on the other."""
    folder = tmp_path / "odd"
    shutil.copytree(compiled["cuda"], folder)
    file = folder / "programs" / "dense.json"
    document = json.loads(file.read_text())
    del document["device"]
    file.write_text(json.dumps(document))
    rehash(folder)
    with pytest.raises(ArtifactError, match="programs: expected all for one device, found cpu, cuda"):
        dllmc.load(folder, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_device_is_chosen_silently(compiled: dict[str, Path]) -> None:
    """Where an artifact's own is missing, loading says what to do; a CPU is taken when asked for alone."""
    with pytest.raises(DeviceError, match=r'no CUDA device on this machine; load it with device="cpu"'):
        dllmc.load(compiled["cuda"])
    with pytest.raises(DeviceError, match="no CUDA device on this machine"):
        dllmc.load(compiled["cuda"], "cuda:0")
    for wanted in (None, "cpu", torch.device("cpu")):
        assert dllmc.load(compiled["cpu"], wanted).device == torch.device("cpu")


def test_a_gpu_cannot_run_what_is_for_a_cpu(compiled: dict[str, Path]) -> None:
    for wanted in ("cuda", "cuda:0"):
        with pytest.raises(
            DeviceError, match=rf'compiled for cpu, so it cannot run on {wanted}; compile with device="cuda"'
        ):
            dllmc.load(compiled["cpu"], wanted)


@pytest.mark.parametrize("wanted", ["tpu", "cuda:x", "mps", "", 3])
def test_other_devices_are_refused(wanted: str, compiled: dict[str, Path]) -> None:
    with pytest.raises(DeviceError, match="expected 'cpu', 'cuda', 'cuda:1'"):
        dllmc.load(compiled["cuda"], wanted)


def test_of_several_gpus_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number the current one; a number that the machine has not is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert devices.resolve(None, "cuda", "x") == devices.resolve("cuda", "cuda", "x") == torch.device("cuda", 1)
    assert devices.resolve("cuda:0", "cuda", "x") == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="device is 'cuda:2', but this machine has 2 CUDA devices"):
        devices.resolve("cuda:2", "cuda", "x")

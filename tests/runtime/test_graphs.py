"""When a shape is recorded and when replayed, and what crosses between host and device: on a CPU that plays both.

`tests.runtime.streams` has what stands in for a GPU's stream. On a GPU the same is in tests/gpu.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import dllmc
from dllmc.errors import ProgramError
from dllmc.ir.program import Affine, Instruction, Program, View
from dllmc.runtime import graphs
from dllmc.runtime.arena import Memory, require_weights
from dllmc.runtime.binding import Binding
from dllmc.runtime.graphs import GraphExecutor
from tests.golden.cases import ROOT
from tests.ops.calls import interpreted
from tests.programs import MAXIMA, TOKENS, planned, shape, tensor, whole
from tests.runtime.streams import Late, Recorder, engine_on
from tests.runtime.test_executor import GROUPS, SHAPES, eager, hand_written, in_chunks, step_of, weights

__all__ = ["weights"]


def executor_of(program: Program, weights: dict[str, torch.Tensor]) -> tuple[GraphExecutor, Recorder]:
    """The program over memory of its own, whose host side is apart."""
    memory = Memory([program], weights)
    memory.set_apart(pinned=False)
    stream = Recorder()
    return GraphExecutor(program, memory, stream), stream


def check(executor: GraphExecutor, weights: dict[str, torch.Tensor], tokens: int, rows: int, seed: int) -> None:
    sizes, inputs = step_of(tokens, rows, seed)
    found, expected = executor.run(sizes, inputs), eager(weights, inputs)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_second_step_of_a_shape_is_recorded_and_later_ones_replayed(weights: dict[str, torch.Tensor]) -> None:
    """With new inputs each; the steps of other shapes between them go their own way."""
    executor, stream = executor_of(planned(hand_written()), weights)
    done = []
    for seed, (tokens, rows) in enumerate([(5, 2), (5, 2), (9, 5), (5, 2), (5, 2), (9, 5), (9, 5), (5, 2)]):
        stream.did.clear()
        check(executor, weights, tokens, rows, seed)
        done.append(" ".join(stream.did))
    call, record, replay = "finish", "record finish", "replay finish"
    assert done == [call, record, call, replay, replay, record, replay, replay]


def test_a_loop_is_recorded_too() -> None:
    """It is unrolled when it is bound."""
    w = torch.ones(8, 6)
    executor, _ = executor_of(in_chunks(4), {"w": w})
    for tokens in (9, 9, 9, 9):
        x = np.random.default_rng(tokens).normal(size=(tokens, 6)).astype(np.float32)
        found = executor.run({**MAXIMA, "tokens": tokens}, {"x": x})["y"]
        expected = (x**2) @ w.numpy().T + (np.arange(tokens) // 4 * 4)[:, None]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_outputs_stay_where_they_are(weights: dict[str, torch.Tensor]) -> None:
    """No step allocates what it returns; by turns it lies in two places of the host, apart from the arena."""
    executor, _ = executor_of(planned(hand_written()), weights)
    places = []
    for seed in range(6):
        found = executor.run(*step_of(7, 4, seed))
        places.append(tuple(output.__array_interface__["data"][0] for output in found.values()))
    assert places == places[:2] * 3
    assert len({*places[0], *places[1]}) == 2 * len(found)
    arena = executor.memory.arena.bytes
    inside = range(arena.data_ptr(), arena.data_ptr() + arena.numel())
    assert not any(place in inside for place in (*places[0], *places[1]))


def test_a_step_may_be_launched_behind_one_that_runs(weights: dict[str, torch.Tensor]) -> None:
    """What it is given and what that one returns lie apart; a third waits until the first is over."""
    program = planned(hand_written())
    memory = Memory([program], weights)
    memory.set_apart(pinned=False)
    stream = Late()
    executor = GraphExecutor(program, memory, stream)
    steps = [step_of(5, 2, seed) for seed in range(6)]
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        waits = [executor.launch(*first), executor.launch(*second)]
        for (_, inputs), found in zip((first, second), [wait() for wait in waits], strict=True):
            for name, value in eager(weights, inputs).items():
                np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    for step in steps:
        executor.launch(*step)
    assert stream.most == 2


def test_a_shape_is_recorded_ahead_of_time_once(weights: dict[str, torch.Tensor]) -> None:
    """On inputs of zeros; the first step that has it is replayed already."""
    executor, stream = executor_of(planned(hand_written()), weights)
    sizes, _ = step_of(5, 2)
    executor.run(*step_of(5, 2))  # which leaves inputs and a binding behind
    assert executor.record(sizes)
    assert not executor.record(sizes)
    stream.did.clear()
    check(executor, weights, 5, 2, 3)
    assert stream.did == ["replay", "finish"]


def test_graphs_are_few_and_shapes_by_turns_are_not_recorded_by_turns(
    weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where all are there, another shape runs call by call, which is said once, until one has long been idle."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    monkeypatch.setattr(graphs, "IDLE_STEPS", 20)
    executor, stream = executor_of(planned(hand_written()), weights)

    def took(tokens: int) -> str:
        stream.did.clear()
        check(executor, weights, tokens, 1, tokens)
        return stream.did[0]

    with caplog.at_level(logging.WARNING):
        assert [took(tokens) for tokens in (1, 1, 2, 2)] == ["finish", "record"] * 2
        assert [took(tokens) for _ in range(4) for tokens in (1, 2, 3)] == ["replay", "replay", "finish"] * 4
        taken = [took(tokens) for _ in range(11) for tokens in (2, 3)]
        assert taken == ["replay", "finish"] * 8 + ["replay", "record"] + ["replay"] * 4
        assert took(1) == "finish"
    assert [record.getMessage() for record in caplog.records] == [
        "program 'dense': 2 shapes of steps are recorded as CUDA graphs, as many as may be; others run call by call, "
        "which is slower"
    ]
    assert len(executor._graphs) == 2


def test_what_cannot_be_recorded_is_refused_by_name(weights: dict[str, torch.Tensor]) -> None:
    executor, stream = executor_of(planned(hand_written()), weights)
    executor.run(*step_of(5, 2))
    stream.fails = True
    with pytest.raises(
        ProgramError, match=r"program 'dense': a step of \(5, 2, 0, 1, 0\) cannot be recorded .*capturing"
    ):
        executor.run(*step_of(5, 2))


def test_inputs_are_checked_as_on_a_cpu(weights: dict[str, torch.Tensor]) -> None:
    executor, _ = executor_of(planned(hand_written()), weights)
    sizes, inputs = step_of(5, 2)
    for _ in range(3):
        with pytest.raises(ProgramError, match=r"^input 'ids': expected int64 \[5\], found int64 \[4\]"):
            executor.run(sizes, {**inputs, "ids": inputs["ids"][:4]})
        executor.run(sizes, inputs)


def test_memory_that_moved_is_refused_for_good(weights: dict[str, torch.Tensor]) -> None:
    """On a GPU torch resizes what it is given: graphs would write to memory that is someone else's by then."""
    executor, _ = executor_of(planned(hand_written()), weights)
    executor.run(*step_of(5, 2))
    executor.memory.arena.bytes = torch.zeros_like(executor.memory.arena.bytes)
    for _ in range(2):
        with pytest.raises(ProgramError, match="the arena moved: a result did not fit its place in it; load the"):
            executor.run(*step_of(5, 2))


def test_a_binding_checks_that_nothing_moved(weights: dict[str, torch.Tensor]) -> None:
    program = planned(hand_written())
    memory = Memory([program], weights)
    sizes, inputs = step_of(5, 2)
    binding = Binding(program, memory, sizes)
    binding.load(inputs)
    binding.run_first()
    memory.pool.bytes = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ProgramError, match="the KV pool moved"):
        binding.run_first()


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("folder", ["llada-mha", "dream-gqa"])
def test_an_engine_with_graphs_decodes_the_same(folder: str, tmp_path: Any) -> None:
    """All programs over one memory: upload, record, replay and read back in any order, and after warming up."""
    options = dllmc.CompileOptions(max_tokens_per_step=200, max_requests=4, max_logit_rows=24, device="cuda")
    loaded = dllmc.compile(ROOT / folder, tmp_path / "out", options)
    plain = dllmc.Engine(loaded, device="cpu")
    stream = Late()
    engine = engine_on(stream, loaded)
    params = [
        dllmc.SamplingParams(gen_length=12, block_length=6, ignore_eos=True, seed=i, temperature=i % 2, cfg_scale=i % 3)
        for i in range(9)
    ]
    prompts = [[(7 * i + 13 * j) % 480 for j in range(1 + 4 * i)] for i in range(9)]
    policies = [
        [dllmc.CachePolicy(mode="none"), dllmc.CachePolicy(retention=0.5, delay=i % 2)][i % 3 > 0] for i in range(9)
    ]
    expected = plain.generate(prompts, params, policies)
    assert engine.warm_up(10, dllmc.SamplingParams(gen_length=12, block_length=6), dllmc.CachePolicy()) > 5
    recorded = stream.did.count("record")
    for _ in range(3):
        assert engine.generate(prompts, params, policies) == expected
    assert stream.did.count("record") > recorded
    assert stream.did.count("replay") > engine.steps / 2


def test_a_cpu_has_nothing_to_warm_up(golden_engine: Callable[[str], dllmc.Engine]) -> None:
    assert golden_engine("llada-mha").warm_up(20, dllmc.SamplingParams(gen_length=8)) == 0


def test_weights_that_are_given_must_be_those_of_the_programs() -> None:
    """Of their dtype and shape, dense, where the programs run: else a step would read what is not theirs."""
    program = hand_written()
    good = {name: torch.zeros([dim.constant for dim in SHAPES[name].shape]) for name in GROUPS["weights"]}
    require_weights([program], {**good, "other": torch.zeros(1)}, "cpu")
    for wrong, found in (
        (None, "nothing"),
        (good["w"].double(), r"float64 \[8, 6\] on cpu"),
        (good["w"][:4], r"float32 \[4, 6\] on cpu"),
        (torch.zeros(6, 8).T, r"float32 \[8, 6\] on cpu"),
        (good["w"].to("meta"), r"float32 \[8, 6\] on meta"),
    ):
        given: dict[str, Any] = {**good, "w": wrong}
        with pytest.raises(
            ProgramError, match=rf"weight 'w': expected float32 \[8, 6\], dense, on cpu, found {found}$"
        ):
            require_weights([program], {name: value for name, value in given.items() if value is not None}, "cpu")


def test_an_engine_takes_weights(tmp_path: Any) -> None:
    """In place of the artifact's own: they decide what it decodes."""
    loaded = dllmc.compile(ROOT / "llada-mha", tmp_path / "out", dllmc.CompileOptions(128, max_logit_rows=16))
    params = dllmc.SamplingParams(gen_length=8, ignore_eos=True)
    own = loaded.load_weights()
    plain, same = dllmc.Engine(loaded), dllmc.Engine(loaded, weights=own)
    other = dllmc.Engine(
        loaded, weights={name: value * 1.5 if value.dim() > 1 else value for name, value in own.items()}
    )
    first, second, third = (engine.generate([5, 6, 7], params) for engine in (plain, same, other))
    assert first == second != third


def test_outputs_of_other_layouts_come_back() -> None:
    """Views of an output's memory are copied as they are seen."""
    x = tensor(TOKENS, 3)
    turned = View("%a", shape(3, TOKENS), shape(1, 3), Affine())
    program = Program(
        "dense",
        MAXIMA,
        {"x": x},
        {},
        {"%a": x},
        (Instruction("copy", (whole("x", x),), (whole("%a", x),)),),
        {"turned": turned},
    )
    executor, _ = executor_of(planned(program), {})
    given = np.arange(12, dtype=np.float32).reshape(4, 3)
    for _ in range(3):
        np.testing.assert_array_equal(executor.run({**MAXIMA, "tokens": 4}, {"x": given})["turned"], given.T)

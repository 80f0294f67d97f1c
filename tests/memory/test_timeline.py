"""The bytes alive at each instruction, and which instructions are of which layer or loop."""

from dataclasses import replace

from hypothesis import given, settings

from dllmc.ir.program import CHUNK, Affine, ForRows, Program
from dllmc.memory.timeline import Stretch, layers, live_bytes, loops, placed
from tests.programs import MAXIMA, TOKENS, planned, program, programs, tensor


@settings(deadline=None, derandomize=True)
@given(programs())
def test_live_bytes_are_the_sum_of_what_is_alive(unplanned: Program) -> None:
    """At each instruction, and their largest sum is the planner's lower bound."""
    step = planned(unplanned)
    kinds = {name: "even" if number % 2 else "odd" for number, name in enumerate(step.buffers)}
    live = live_bytes(step, kinds)
    sums = []
    for index in range(len(step.instructions)):
        alive = {"even": 0, "odd": 0}
        for name, buffer in step.buffers.items():
            assert buffer.lifetime is not None
            if buffer.lifetime[0] <= index < buffer.lifetime[1]:
                alive[kinds[name]] += -(-buffer.size_bytes(step.maxima) // 64) * 64
        assert {kind: int(counts[index]) for kind, counts in live.items()} == {k: alive[k] for k in live}
        sums.append(sum(alive.values()))
    assert max(sums) == step.lower_bound_bytes


@settings(deadline=None, derandomize=True)
@given(programs())
def test_every_planned_buffer_is_placed(unplanned: Program) -> None:
    """In the order in which they are written, at the offset of the plan."""
    step = planned(unplanned)
    found = placed(step)
    assert {b.name: ((b.start, b.stop), b.offset) for b in found} == {
        name: (buffer.lifetime, buffer.offset) for name, buffer in step.buffers.items()
    }
    assert [b.start for b in found] == sorted(b.start for b in found)
    assert placed(unplanned) == []


def test_layers_are_told_from_weights() -> None:
    """What reads no weight, or a constant alone, is where the one before it is; the head is outside again."""
    names = ["wte", "m.layers.0.norm", "m.layers.0.mlp.experts.3.w", "m.layers.1.norm", "head", "constant.7.x"]
    reads = [["wte"], ["m.layers.0.norm"], ["a"], ["constant.7.x"], ["m.layers.0.mlp.experts.3.w"]]
    reads += [["m.layers.1.norm"], ["head"], ["a"]]
    step = program(
        {name: tensor(4) for name in ("a", "b")},
        [(read, ["b" if read == ["a"] else "a"]) for read in reads],
        weights={name: tensor(4) for name in names},
    )
    assert layers(step) == [Stretch("m.layers.0", 1, 5), Stretch("m.layers.1", 5, 6)]


def test_a_program_without_repeated_layers_has_none() -> None:
    assert layers(program({"a": tensor(4)}, [(["w"], ["a"])], weights={"w": tensor(4)})) == []


def looped() -> Program:
    """Three instructions, of which the second and third run for a chunk of rows after another."""
    chunk = Affine(0, ((CHUNK, 1),))
    plain = program(
        {"a": tensor(TOKENS, 4), "part": tensor(chunk, 4), "b": tensor(TOKENS, 4)},
        [(["x"], ["a"]), (["a"], ["part"]), (["part"], ["b"])],
        returns=["b"],
        inputs={"x": tensor(TOKENS, 4)},
    )
    first, *body = plain.instructions
    loop = ForRows(TOKENS, tuple(body))  # type: ignore[arg-type]
    return planned(replace(plain, maxima={**MAXIMA, CHUNK: 2}, instructions=(first, loop)))


def test_loops_count_each_instruction_once() -> None:
    """And what is whole lives all through a loop, its chunks only while they are used."""
    step = looped()
    assert loops(step) == [Stretch("2 of tokens", 1, 3)]
    assert {b.name: (b.start, b.stop, b.size_bytes) for b in placed(step)} == {
        "a": (0, 3, 192),
        "part": (1, 3, 64),
        "b": (1, 3, 192),
    }
    assert live_bytes(step, dict.fromkeys(step.buffers, "any"))["any"].tolist() == [192, 448, 448]

"""Reports of an engine on tasks: counts, intervals, and the teacher-forced NLL against brute force."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

import dllmc
from dllmc import evaluate as evaluation
from dllmc.errors import TaskError
from dllmc.evaluate import Difference, evaluate, infilling_nlls, normal, wilson
from dllmc.tasks import python_source, sudoku
from tests.brute_force import Decoded, decode

LENGTHS = {"gen_length": 20, "block_length": 20}
CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-llada"


@pytest.fixture(scope="module")
def engine(tiny_llada: Path) -> dllmc.Engine:
    return dllmc.load(tiny_llada)


def test_a_report_counts_what_was_done(engine: dllmc.Engine) -> None:
    """Dense decoding takes a pass a token; a completion has its 19 characters and the end token."""
    report = evaluate(engine, "sudoku", count=5, seed=1)
    assert (report.task, report.examples, report.accuracy) == ("sudoku", 5, 1.0)
    assert (report.forward_passes, report.tokens) == (5 * 20, 5 * 20)
    assert report.interval == wilson(5, 5)
    assert report.nll is None
    assert report.tokens_per_second == report.tokens / report.seconds > 0


def test_sampling_is_the_callers(engine: dllmc.Engine) -> None:
    """A threshold takes fewer passes for the same answers."""
    report = evaluate(engine, "sudoku", count=5, seed=1, sampling={"threshold": 0.9})
    assert report.accuracy == 1.0
    assert report.forward_passes < 5 * 20


def test_a_file_of_examples(engine: dllmc.Engine, tmp_path: Path) -> None:
    """Half of the outputs are not what the model says."""
    examples = sudoku.TASK.examples(4, 9)
    lines = [{"input": e.input, "output": e.output if i % 2 else "1234"} for i, e in enumerate(examples)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    report = evaluate(engine, str(file), sampling=LENGTHS)
    right = sum(evaluate_one(engine, line) for line in lines)
    assert report.accuracy == right / len(lines)
    assert 0 < right <= 2
    assert report.task == "mine.jsonl"


def evaluate_one(engine: dllmc.Engine, line: dict[str, str]) -> bool:
    (result,) = engine.generate(line["input"], dllmc.SamplingParams(**LENGTHS))
    return result.text == line["output"]


def test_infilling_reports_the_references_nll(engine: dllmc.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free decoding gives the accuracy, forced decoding the NLL: both as the brute-force decoder has them."""
    monkeypatch.setattr(evaluation, "WINDOW", 48)
    monkeypatch.setattr(evaluation, "GAP", 6)
    seed, free, forced, truth = next(filter(None, (by_brute_force(engine, seed) for seed in range(100))))
    report = evaluate(engine, "code", count=3, seed=seed)
    found = [fmean(a == b for a, b in zip(d.token_ids, t, strict=False)) for d, t in zip(free, truth, strict=True)]
    nll = [-fmean(p for p in d.logprobs if p is not None) for d in forced]
    assert report.accuracy == fmean(found)
    assert report.nll == pytest.approx(fmean(nll), rel=1e-4)
    assert report.nll_interval == pytest.approx(normal(nll), rel=1e-3)
    assert report.nlls == pytest.approx(nll, rel=1e-4)
    assert infilling_nlls(engine, 3, seed) == pytest.approx(nll, rel=1e-4)
    assert (report.forward_passes, report.tokens) == (18, 18)


def by_brute_force(engine: dllmc.Engine, seed: int) -> tuple[int, list[Decoded], list[Decoded], list[list[int]]] | None:
    """Three gaps of 6 tokens decoded freely and forced, and the truth; None where rounding could decide."""
    model, spec, tokenizer = dllmc.load_model(CHECKPOINT), engine.spec, engine.tokenizer
    assert tokenizer is not None
    free, forced, truth = [], [], []
    for gap in python_source.gaps(tokenizer.encode, spec.end_ids[0], count=3, seed=seed, window=48, length=6):
        behind = {i - gap.start: gap.window[i] for i in range(gap.start + 6, 48)}
        params = {"gen_length": 48 - gap.start, "block_length": 6, "ignore_eos": True, "infill": behind}
        free.append(decode(model, spec, gap.window[: gap.start], **params))
        forced.append(decode(model, spec, gap.window[: gap.start], **params, reference=gap.window[gap.start :]))
        truth.append(gap.window[gap.start : gap.start + 6])
    return (seed, free, forced, truth) if all(d.decisive for d in (*free, *forced)) else None


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [(95, 100, (0.8882, 0.9785)), (10, 10, (0.7225, 1.0)), (0, 10, (0.0, 0.2775)), (1, 1, (0.2065, 1.0))],
)
def test_wilson_intervals(right: int, count: int, interval: tuple[float, float]) -> None:
    """Published values for 95 %."""
    assert wilson(right, count) == pytest.approx(interval, abs=1e-4)


def test_steps_of_code_are_those_of_a_gap(engine: dllmc.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks of given text follow the gap; its length is no parameter."""
    monkeypatch.setattr(evaluation, "WINDOW", 48)
    monkeypatch.setattr(evaluation, "GAP", 6)
    assert evaluate(engine, "code", 4, 0, {"steps": 2}).forward_passes == 4 * 2
    with pytest.raises(TaskError, match="task 'code': gen_length cannot be chosen; gaps have 6 tokens"):
        evaluate(engine, "code", 4, 0, {"gen_length": 8})


def test_normal_intervals() -> None:
    """1.96 standard errors on either side of the mean: 1.2910 / 2 for 1, 2, 3, 4."""
    assert normal([1, 2, 3, 4]) == pytest.approx((2.5 - 1.26517, 2.5 + 1.26517), abs=1e-4)
    assert normal([3.0]) == (-math.inf, math.inf)


def test_differences_are_paired(engine: dllmc.Engine) -> None:
    """Scores that differ far between examples and little between policies have a narrow interval."""
    report = evaluate(engine, "add", count=4)
    one, other = replace(report, scores=(0.0, 0.5, 1.0, 0.5)), replace(report, scores=(0.25, 0.75, 1.0, 0.75))
    difference = Difference.of(other, one)
    assert difference.accuracy == 0.1875
    assert difference.interval == pytest.approx((0.1875 - 0.1225, 0.1875 + 0.1225), abs=1e-4)
    assert difference.nll is None
    of_nll = Difference.of(replace(other, nlls=(1.0, 3.0, 5.0, 7.0)), replace(one, nlls=(1.5, 3.5, 5.5, 7.5)))
    assert (of_nll.nll, of_nll.nll_interval) == (-0.5, (-0.5, -0.5))


@pytest.mark.parametrize(
    ("task", "count", "message"),
    [
        ("chess", 3, r"unknown task 'chess'; expected sudoku, add, code or a file that ends in \.jsonl"),
        ("sudoku", 0, "0 examples; expected at least 1"),
        ("nowhere.jsonl", 1, r"nowhere\.jsonl: cannot be read"),
    ],
)
def test_impossible_evaluations_are_errors(engine: dllmc.Engine, task: str, count: int, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        evaluate(engine, task, count)

"""`benchmarks/tune.py` and what kernels look up: stored fields replace defaults, for their bucket and GPU alone."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import tune
from dllmc.ops.kernels import attention, configs, decode_head
from dllmc.ops.kernels.configs import Launch, bucket, configured

DEFAULT = Launch(1024)
KINDS = {"attention": attention.Tile, "attention_cached": attention.Tile, "decode_head": decode_head.Tile}
ON_GPU: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 9.0, and a configuration of one bucket."""
    monkeypatch.setattr(configs, "_capability", lambda device: "9.0")
    found = {"9.0": {"norm": {"bfloat16": {"rows=512,width=4096": {"tile": 4096, "warps": 8}}}}}
    monkeypatch.setattr(configs, "_all", lambda: found)


def test_nothing_is_stored_that_was_not_measured() -> None:
    assert configs._all() == {}


def test_sizes_share_buckets() -> None:
    assert bucket(width=4096, rows=300) == "rows=512,width=4096"
    assert [bucket(n=n) for n in (0, 1, 2, 3, 4, 5)] == ["n=1", "n=1", "n=2", "n=4", "n=4", "n=8"]


def test_stored_fields_replace_defaults(tuned: None) -> None:
    """Of that kernel, bucket and dtype; not on a CPU, where kernels are interpreted."""
    assert configured(DEFAULT, "norm", ON_GPU, rows=300, width=4000) == Launch(4096, 8)
    assert configured(DEFAULT, "norm", ON_GPU, rows=600, width=4000) == DEFAULT
    assert configured(DEFAULT, "glu", ON_GPU, rows=300, width=4000) == DEFAULT
    assert configured(DEFAULT, "norm", torch.zeros(1, dtype=torch.bfloat16), rows=300, width=4000) == DEFAULT


def test_candidates_have_the_fields_of_their_kernels() -> None:
    """And no more threads than elements."""
    for tunable in tune.TUNABLES:
        kind = KINDS.get(tunable.kernel, Launch)
        assert tunable.candidates
        for candidate in tunable.candidates:
            assert candidate.keys() <= {field.name for field in fields(kind)}
            assert "tile" not in candidate or candidate["tile"] >= 32 * candidate["warps"]


def test_trying_sees_what_a_kernel_asks_for(tuned: None) -> None:
    """Others get what is stored, and afterwards the kernel does again."""
    with tune.trying("rope", {"tile": 64}) as asked:
        assert configured(DEFAULT, "rope", ON_GPU, tokens=3) == Launch(64)
        assert configured(DEFAULT, "norm", ON_GPU, rows=300, width=4000) == Launch(4096, 8)
    assert asked == {("rope", "9.0", "bfloat16", "tokens=4")}
    assert configured(DEFAULT, "rope", ON_GPU, tokens=3) == DEFAULT


def test_the_best_is_clearly_better_at_all_shapes_of_a_bucket() -> None:
    inf = float("inf")
    assert tune.best({0: [0.9, 1.0], 1: [0.8, 0.9], 2: [0.1]}) == (1, pytest.approx(0.85))
    assert tune.best({0: [0.99], 1: [inf]}) is None
    assert tune.best({}) is None


def test_what_is_found_is_added_to_the_file() -> None:
    stored = {"9.0": {"norm": {"bfloat16": {"width=8": {"warps": 2}}}}}
    key = ("norm", "9.0", "bfloat16", "width=4")
    whole = tune.merged(stored, {key: {"tile": 64, "stages": (3, 2)}})
    of_norm = whole["9.0"]["norm"]["bfloat16"]
    assert of_norm == {"width=4": {"stages": [3, 2], "tile": 64}, "width=8": {"warps": 2}}


def test_without_a_gpu_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(tune.main, [])
    assert done.exit_code == 1
    assert "no GPU" in done.output

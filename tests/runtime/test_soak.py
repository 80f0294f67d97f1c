"""A sample of `benchmarks/soak.py`: threads, cancels, priorities, preemptions; every result as if it were alone."""

from pathlib import Path

import pytest

from benchmarks.soak import soak


@pytest.mark.parametrize("requests", [250, pytest.param(3000, marks=pytest.mark.slow)])
def test_every_result_is_what_it_is_alone(requests: int, tmp_path: Path) -> None:
    found = soak(tmp_path, requests, seed=requests)
    assert found["wrong"] == []
    assert found["finished"] + found["cancelled"] == requests
    assert found["cancelled"] > 0.02 * requests
    assert found["preemptions"] > 0.05 * requests
    assert (found["pages_held_in_the_end"], found["requests_left_in_the_end"]) == (0, 0)
    assert found["resident_growth_bytes"] < 128 * 2**20

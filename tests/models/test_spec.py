"""ModelSpec: which values it takes, and its JSON form."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.errors import ConfigError
from dllmc.spec import ModelSpec

VALID: dict[str, Any] = {"vocab_size": 8, "mask_id": 7, "end_ids": [0, 7], "shifted": True, "max_positions": 2}


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    width = draw(st.integers(1, 200_000))
    ids = st.integers(0, width - 1)
    return ModelSpec(
        width, draw(ids), tuple(draw(st.lists(ids, max_size=4))), draw(st.booleans()), draw(st.integers(2, 1 << 20))
    )


@settings(deadline=None, derandomize=True)
@given(specs())
def test_a_spec_survives_json(spec: ModelSpec) -> None:
    """`from_dict` gives back what `to_dict` wrote, through JSON text, and it can still be hashed."""
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


def test_a_spec_has_defaults_for_shift_and_length() -> None:
    spec = ModelSpec(vocab_size=8, mask_id=7, end_ids=())
    assert (spec.shifted, spec.max_positions) == (False, 4096)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", 1 << 31),
        ("vocab_size", True),
        ("vocab_size", 8.0),
        ("mask_id", 8),
        ("mask_id", -1),
        ("mask_id", None),
        ("end_ids", [0, 8]),
        ("end_ids", [-1]),
        ("end_ids", [False]),
        ("end_ids", 7),
        ("shifted", 1),
        ("max_positions", 1),
        ("max_positions", "4096"),
    ],
)
def test_a_value_out_of_range_is_refused_by_field_and_value(field: str, value: object) -> None:
    """The message names the field and what was found."""
    with pytest.raises(ConfigError, match=rf"{field}: expected .*, found ") as caught:
        ModelSpec.from_dict({**VALID, field: value})
    assert repr(tuple(value) if isinstance(value, list) else value) in str(caught.value)


@pytest.mark.parametrize("field", VALID)
def test_a_missing_field_is_refused(field: str) -> None:
    """A stored spec is complete: defaults are for specs written by hand."""
    with pytest.raises(ConfigError, match=rf"missing: {field}; unknown: none"):
        ModelSpec.from_dict({name: value for name, value in VALID.items() if name != field})


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="missing: none; unknown: eos_id, pad_id"):
        ModelSpec.from_dict({**VALID, "pad_id": 0, "eos_id": 0})


def test_the_spec_needs_no_torch() -> None:
    code = "import sys, dllmc.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

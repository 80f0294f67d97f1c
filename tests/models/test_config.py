"""config.json: every field that is missing, malformed or not supported is an error with file and field."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllmc.errors import ConfigError, DllmcError
from dllmc.models.checkpoint import load_model, load_spec
from tests.models.folders import GOLDEN, NAMES, copy_of, edit_config


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_a_config_that_is_not_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json: expected JSON, found something else"):
        load_model(folder)


def test_a_config_that_is_not_an_object_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json: expected a JSON object .*, found a list"):
        load_model(folder)


@pytest.mark.parametrize("model_type", ["qwen2", "dream", "", None, 3, ["llada"]])
def test_an_unknown_model_type_is_refused_with_the_choices(folder: Path, model_type: object) -> None:
    edit_config(folder, model_type=model_type)
    with pytest.raises(ConfigError, match=r"config\.json: field 'model_type': expected one of Dream, llada .*found"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("llada-mha", "d_model", None, "expected a value, found None"),
        ("llada-mha", "n_layers", "3", "expected a positive integer, found '3'"),
        ("llada-mha", "n_heads", 5, "expected a divisor of d_model = 64, found 5"),
        ("llada-mha", "n_kv_heads", 3, "expected a divisor of n_heads = 4, found 3"),
        ("llada-mha", "embedding_size", 100, "expected at least vocab_size = 512, found 100"),
        ("llada-mha", "weight_tying", "no", "expected true or false, found 'no'"),
        ("llada-mha", "rope_theta", -1, "expected a positive number, found -1"),
        ("llada-mha", "block_type", "sequential", "expected 'llama' .* found 'sequential'"),
        ("llada-mha", "activation_type", "gelu", "expected 'silu' .* found 'gelu'"),
        ("llada-mha", "alibi", True, "expected False .* found True"),
        ("llada-mha", "rope", False, "expected True .* found False"),
        ("dream-gqa", "num_attention_heads", 64, "expected an even head size, found 64"),
        ("dream-gqa", "rope_scaling", {"type": "yarn"}, "expected None .* found {'type': 'yarn'}"),
        ("dream-gqa", "use_sliding_window", True, "expected False .* found True"),
    ],
)
def test_a_config_field_that_is_not_supported_is_named(
    name: str, field: str, value: object, expected: str, tmp_path: Path
) -> None:
    edit_config(copy_of(name, tmp_path), **{field: value})
    with pytest.raises(ConfigError, match=rf"{tmp_path}/config\.json: field '{field}': {expected}"):
        load_model(tmp_path)


def test_a_null_config_field_is_absent(folder: Path) -> None:
    """Published configs spell defaults as null."""
    edit_config(folder, rope=None, alibi=None, scale_logits=None, n_kv_heads=None, embedding_size=None)
    assert torch.equal(
        load_model(folder)(torch.arange(9)[None]), load_model(GOLDEN / "llada-mha")(torch.arange(9)[None])
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(NAMES), st.data())
def test_any_value_of_any_field_gives_a_spec_or_a_typed_error(tmp_path: Path, name: str, data: st.DataObject) -> None:
    copy_of(name, tmp_path)
    field = data.draw(st.sampled_from(sorted(json.loads((tmp_path / "config.json").read_text()))))
    edit_config(tmp_path, **{field: data.draw(JSON | st.just(10**400))})
    error = None
    try:
        load_spec(tmp_path)
    except DllmcError as caught:
        error = caught
    assert error is None or str(tmp_path) in str(error)

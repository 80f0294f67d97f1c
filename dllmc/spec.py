"""What decoding must know about a model besides its forward pass.

Written into an artifact's manifest and read back by the runtime; needs no torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dllmc.errors import ConfigError

# What a request may name at most; the tables of a step are planned for it.
MAX_SUPPRESS_TOKENS = 64
MAX_DEFER_TOKENS = 64
MAX_TOP_K = 1024


@dataclass(frozen=True)
class ModelSpec:
    """Facts about a masked-diffusion model. Raises `ConfigError` where one is out of range.

    vocab_size: width V of the head, rows of the logits; it can exceed the tokenizer's vocabulary.
    mask_id: the token that stands for a position still to be predicted, in [0, V).
    end_ids: tokens that end a completion, each in [0, V); may be empty.
    shifted: row i - 1 of the logits predicts position i (Dream), instead of row i (LLaDA).
    max_positions: the longest sequence, prompt plus completion, in tokens.
    """

    vocab_size: int
    mask_id: int
    end_ids: tuple[int, ...]
    shifted: bool = False
    max_positions: int = 4096

    def __post_init__(self) -> None:
        width = self.vocab_size
        self._require(_is_int(width) and 1 <= width < 1 << 31, "vocab_size", "a positive integer below 2**31")
        self._require(_is_id(self.mask_id, width), "mask_id", f"a token id in [0, {width})")
        ids_fit = isinstance(self.end_ids, tuple) and all(_is_id(i, width) for i in self.end_ids)
        self._require(ids_fit, "end_ids", f"a tuple of token ids in [0, {width})")
        self._require(isinstance(self.shifted, bool), "shifted", "True or False")
        self._require(_is_int(self.max_positions) and self.max_positions >= 2, "max_positions", "an integer >= 2")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `from_dict` reads them back."""
        return asdict(self) | {"end_ids": list(self.end_ids)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelSpec":
        """Read what `to_dict` wrote. Raises `ConfigError` for an unknown, a missing or an invalid field."""
        expected = {field.name for field in fields(cls)}
        if values.keys() != expected:
            missing, unknown = sorted(expected - values.keys()), sorted(values.keys() - expected)
            raise ConfigError(
                f"model spec: expected exactly the fields {', '.join(sorted(expected))}; "
                f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        end_ids = values["end_ids"]
        return cls(**{**values, "end_ids": tuple(end_ids) if isinstance(end_ids, list) else end_ids})

    def _require(self, ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise ConfigError(f"model spec: {field}: expected {expected}, found {getattr(self, field)!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: int, width: int) -> bool:
    return _is_int(value) and 0 <= value < width

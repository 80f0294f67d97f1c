"""Reading a checkpoint's JSON strictly: each field is checked where it is read; an error names file and field."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllmc.errors import ConfigError, DllmcError


def read_json(path: Path, error: type[DllmcError] = ConfigError) -> dict[str, Any]:
    """The JSON object in a file. Raises `error` where the file holds something else."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: expected JSON, found something else ({cause}); download or write it again") from cause
    if not isinstance(values, dict):
        raise error(f"{path}: expected a JSON object {{...}}, found a {type(values).__name__}")
    return values


@dataclass(frozen=True)
class Fields:
    """A config's fields, and the file they came from (for messages). JSON null counts as absent."""

    values: Mapping[str, Any]
    where: str

    def require(self, ok: bool, field: str, expected: str) -> None:
        """Raise `ConfigError` naming the field, what was expected and what was found, unless `ok`."""
        if not ok:
            found = repr(self.values[field]) if field in self.values else "nothing"
            raise ConfigError(f"{self.where}: field {field!r}: expected {expected}, found {found}")

    def positive_int(self, field: str, default: int | None = None) -> int:
        """A positive integer; `default` where the field is absent or null (None: it must be there)."""
        value = self._get(field, default)
        self.require(isinstance(value, int) and not isinstance(value, bool) and value > 0, field, "a positive integer")
        return int(value)

    def number(self, field: str, default: float) -> float:
        """A positive number that a float can hold."""
        value = self._get(field, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        ok = is_number and 0 < value <= sys.float_info.max
        self.require(ok, field, "a positive number")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        """A JSON boolean."""
        value = self._get(field, default)
        self.require(isinstance(value, bool), field, "true or false")
        return bool(value)

    def token_ids(self, field: str) -> tuple[int, ...]:
        """One token id or a list of them, as a tuple; empty where the field is absent or null."""
        value = self.values.get(field)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        ok = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        self.require(ok, field, "a token id or a list of token ids")
        return tuple(ids)

    def require_value(self, field: str, expected: object, meaning: str) -> None:
        """Refuse a variant that the reference models do not have; an absent field passes."""
        value = self.values.get(field)
        ok = value is None or value == expected
        self.require(ok, field, f"{expected!r} ({meaning}; other variants are not supported)")

    def require_divides(self, divisor: str, field: str) -> None:
        """Require that one positive field divides another."""
        d, n = self.positive_int(divisor), self.positive_int(field)
        self.require(n % d == 0, divisor, f"a divisor of {field} = {n}")

    def _get(self, field: str, default: Any) -> Any:
        value = self.values.get(field)
        if value is None:
            self.require(default is not None, field, "a value")
            return default
        return value

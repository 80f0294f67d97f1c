"""Reading config.json strictly: each field is checked where it is read, and an error names file and field."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dllmc.errors import ConfigError

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
        """A positive number."""
        value = self._get(field, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        self.require(ok, field, "a positive number")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        """A JSON boolean."""
        value = self._get(field, default)
        self.require(isinstance(value, bool), field, "true or false")
        return bool(value)

    def require_value(self, field: str, expected: object, meaning: str) -> None:
        """Refuse a variant that the reference models do not have; an absent field passes."""
        value = self.values.get(field, expected)
        ok = value == expected or (value is None and expected is False)
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

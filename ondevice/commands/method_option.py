"""Options of the form METHOD:key=value,...: a name, and settings that only it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ondevice.errors import OptionError


@dataclass(frozen=True, slots=True)
class MethodOption:
    """What a `--sparsity` asks for.

    Args:
        text: as it was written.
        method: its name.
        values: of each of the method's keys.
    """

    text: str
    method: str
    values: dict[str, str]

    def number(self, key: str, high: float = 1.0, zero: bool = False) -> float:
        """A number above 0, or from 0 on with `zero`, at most `high`."""
        text = self.values[key]
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= high or (value == 0 and not zero):
            least = "from 0 on" if zero else "above 0"
            raise OptionError(
                f"--sparsity {self.text}: {key} is {text!r}; it must be a number {least}, at most {high:g}"
            )
        return value

    def whole(self, key: str, high: int = 1 << 20, zero: bool = False) -> int:
        """A whole number from 1 on, or from 0 on with `zero`."""
        value = self.number(key, high, zero)
        if value != int(value):
            raise OptionError(f"--sparsity {self.text}: {key} is {self.values[key]!r}; it must be a whole number")
        return int(value)

    def word(self, key: str, *known: str) -> str:
        """One of some words."""
        value = self.values[key]
        if value not in known:
            raise OptionError(f"--sparsity {self.text}: {key} is {value!r}; take one of {', '.join(known)}")
        return value

    def divisor(self, key: str, width: int, what: str) -> int:
        """A whole number that divides a width, in whose place a message has `what`."""
        value = self.whole(key)
        if width % value:
            raise OptionError(
                f"--sparsity {self.text}: {key} is {value}, which does not divide {what} ({width}); take a divisor"
            )
        return value


def read_method(text: str, keys: Mapping[str, Mapping[str, str]]) -> tuple[str, dict[str, str]]:
    """Name and settings that `METHOD[:key=value,...]` states, over the defaults.

    Args:
        text: of the option.
        keys: of each method, with what they are if not given.

    Raises:
        OptionError: an unknown method, key, or no value.
    """
    name, _, rest = text.partition(":")
    if name not in keys:
        raise OptionError(f"--sparsity {text}: {name!r} is not known; known are {', '.join(keys)}")
    values = dict(keys[name])
    for item in filter(None, rest.split(",")):
        key, sign, value = (part.strip() for part in item.partition("="))
        if key not in values or not sign or not value:
            known = f"write key=value with keys of {name}: {', '.join(values)}" if values else f"{name} has no keys"
            raise OptionError(f"--sparsity {text}: {item!r}; {known}")
        values[key] = value
    return name, values

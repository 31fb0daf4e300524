"""Checked reading of a model's settings from a mapping that somebody else wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.spec import ModelSpec, RopeSpec

MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 12
MAX_WIDTH = 1 << 20  # of the residual stream, the FFN or a head
MAX_VOCAB = 1 << 24
MAX_CONTEXT = 1 << 28
MAX_PARAMETERS = 1 << 43

_REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """Settings by key, each checked for type and range. A key that is missing or null takes the default.

    Args:
        values: the settings.
        path: file that they come from, for messages.
        prefix: put before every key.
        section: put before every key in messages: where these settings lie in the file.
    """

    values: Mapping[str, Any]
    path: Path
    prefix: str = ""
    section: str = ""

    def raw(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key.

        Raises:
            CheckpointError: it is missing and there is no default.
        """
        value = self.values.get(self.prefix + key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(key, "is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1, high: int = MAX_WIDTH) -> int:
        """An integer in [low, high]."""
        value = self.raw(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"{_short(value)} is no integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number in [low, high]."""
        value = self.raw(key, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.error(key, f"{_short(value)} is no number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """A truth value."""
        value = self.raw(key, default)
        if type(value) is not bool:
            raise self.error(key, f"{_short(value)} is neither true nor false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self.raw(key, default)
        if type(value) is not str:
            raise self.error(key, f"{_short(value)} is no string")
        return value

    def over(self, defaults: Mapping[str, Any]) -> Fields:
        """These settings, and others for the keys that are missing; one that is null stays null."""
        return Fields({**defaults, **self.values}, self.path, self.prefix, self.section)

    def sub(self, key: str) -> Fields:
        """The settings nested under a key, none if it is missing."""
        value = self.raw(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, f"{_short(value)} is no object")
        return Fields(value, self.path, section=f"{self.section}{key}." if self.section else "")

    def known(self, *keys: str) -> None:
        """Raises CheckpointError if there is any other key."""
        unknown = sorted(set(self.values) - set(keys))
        if unknown:
            raise self.error(unknown[0][:60], f"is unknown here, where {', '.join(keys)} may stand; take it out")

    def integers(self, key: str, count: int, low: int = 1, high: int = MAX_WIDTH) -> tuple[int, ...]:
        """A list of `count` integers in [low, high]."""
        value = self.raw(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.error(key, f"must be a list of {count} integers")
        if not all(type(x) is int and low <= x <= high for x in value):
            raise self.error(key, f"must hold integers from {low} to {high} only")
        return tuple(value)

    def numbers(self, key: str, count: int, zero: bool = False) -> tuple[float, ...]:
        """A list of `count` positive finite numbers, or 0 where that is allowed."""
        value = self.raw(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.error(key, f"must be a list of {count} numbers")
        if not all(type(x) in (int, float) and math.isfinite(x) and (x > 0 or (zero and x == 0)) for x in value):
            raise self.error(key, f"must hold positive finite numbers{' or 0' if zero else ''} only")
        return tuple(float(x) for x in value)

    def error(self, key: str, problem: str) -> CheckpointError:
        """A CheckpointError about one key."""
        return CheckpointError(self.path, problem, self.section + self.prefix + key)

    def unsupported(self, key: str, problem: str) -> UnsupportedModelError:
        """An UnsupportedModelError about one key."""
        return UnsupportedModelError(self.path, problem, self.section + self.prefix + key)


def check_spec(spec: ModelSpec, path: Path) -> ModelSpec:
    """Checks what concerns several settings together.

    Returns:
        The spec itself.

    Raises:
        CheckpointError: the sizes contradict each other or are absurd.
    """
    if spec.n_heads % spec.n_kv_heads:
        raise CheckpointError(path, f"{spec.n_heads} heads are no multiple of {spec.n_kv_heads} KV heads")
    for rope in (spec.rope, spec.local_rope):
        _check_rope(rope, spec.head_dim, path)
    parameters = sum(math.prod(shape) for shape in spec.tensors().values())
    if parameters > MAX_PARAMETERS:
        raise CheckpointError(path, f"the sizes ask for {parameters} parameters, beyond {MAX_PARAMETERS}")
    return spec


def _check_rope(rope: RopeSpec | None, head_dim: int, path: Path) -> None:
    if rope is None:
        return
    if rope.dim % 2 or not 0 < rope.dim <= head_dim:
        raise CheckpointError(path, f"{rope.dim} rotated dimensions do not fit heads of {head_dim}; even, at most that")
    if rope.scaling in ("llama3", "yarn", "longrope") and not rope.original_context:
        raise CheckpointError(path, f"rope scaling {rope.scaling} needs the original context length")
    if rope.scaling == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise CheckpointError(path, "rope scaling llama3 needs high_freq_factor above low_freq_factor")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

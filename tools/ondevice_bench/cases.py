"""Tests by name: `pp512` reads a prompt, `tg128` generates, `@ d4096` after so many tokens, `b32` for so many rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ondevice.errors import OptionError

if TYPE_CHECKING:
    from ondevice.spec import ModelSpec

MAX_TOKENS = 1 << 24
"""Of a number in a name: more than any context, and few enough for int32."""
NAME = re.compile(r"(pp|tg)(\d+)(?:\s*@\s*d(\d+))?(?:\s*b(\d+))?")


@dataclass(frozen=True, slots=True)
class Case:
    """One test.

    Args:
        kind: "pp" (prompts are read) or "tg" (tokens are generated one after the other).
        tokens: of each sequence that are timed.
        depth: tokens that each sequence holds before, not timed.
        batch: sequences; "tg" decodes them together, "pp" reads them one after the other.
    """

    kind: str
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """As llama-bench names tests, with the batch behind."""
        depth = f" @ d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.tokens}{depth}" + (f" b{self.batch}" if self.batch > 1 else "")

    @property
    def positions(self) -> int:
        """Positions of each sequence at the end."""
        return self.depth + self.tokens


def grid(prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int], batches: Sequence[int]) -> list[Case]:
    """Every combination: for each depth and batch all prompts, then all lengths of answers."""
    kinds = [("pp", n) for n in prompts] + [("tg", n) for n in generated]
    return [Case(kind, n, depth, batch) for depth in depths for batch in batches for kind, n in kinds]


def parse(text: str) -> list[Case]:
    """Tests from their names, with commas between.

    Raises:
        OptionError: a name that is none.
    """
    return [_parse_one(part.strip()) for part in text.split(",")]


def _parse_one(name: str) -> Case:
    found = NAME.fullmatch(name)
    if found is None:
        raise OptionError(f"{name!r} is no test; write pp512, tg128, tg128@d4096 or tg128 b8, with commas between")
    numbers = [None if part is None else int(part) for part in found.groups()[1:]]
    tokens, depth, batch = (default if n is None else n for n, default in zip(numbers, (0, 0, 1)))
    if not tokens or not batch or max(tokens, depth, batch) > MAX_TOKENS:
        raise OptionError(f"test {name!r}: tokens and batch must lie in 1..{MAX_TOKENS}, the depth in 0..{MAX_TOKENS}")
    return Case(found[1], tokens, depth, batch)


def check(cases: Sequence[Case], spec: ModelSpec, name: str) -> None:
    """Raises OptionError if a test needs more positions than the model has.

    Args:
        name: of the model, for the message.
    """
    for case in cases:
        if case.positions > spec.context_length:
            option = "-p" if case.kind == "pp" else "-n"
            way = f"lower {option} {case.tokens}" + (f" or -d {case.depth}" if case.depth else "")
            raise OptionError(
                f"{case.name} needs {case.positions} positions; {name} has a context of {spec.context_length}; {way}"
            )

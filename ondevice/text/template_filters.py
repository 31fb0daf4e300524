"""Jinja's own filters that could take long or grow large, with bounded arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2.filters import FILTERS, make_attrgetter
from jinja2.utils import pass_environment, pass_eval_context

from ondevice.text.template_values import ITEM, TooLarge, limit, weight, whole_numbers

_MAX_LINKED = 20_000
_MAX_PRECISION = 300


def _batch(value: Any, linecount: int, fill_with: Any = None) -> Any:
    limit(ITEM * linecount + (linecount * weight(fill_with) if fill_with is not None else 0), "batch")
    return FILTERS["batch"](value, linecount, fill_with)


def _center(value: str, width: int = 80) -> Any:
    limit(width, "center")
    return FILTERS["center"](value, width)


def _filesizeformat(value: Any, binary: bool = False) -> Any:
    whole_numbers(value)
    return FILTERS["filesizeformat"](value, binary)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    whole_numbers(value)
    if abs(precision) > _MAX_PRECISION:
        raise TooLarge(f"round to more than {_MAX_PRECISION} digits")
    return FILTERS["round"](value, precision, method)


@pass_eval_context
def _slice(context: Any, value: Any, slices: int, fill_with: Any = None) -> Any:
    limit(ITEM * slices + (slices * weight(fill_with) if fill_with is not None else 0), "slice")
    return FILTERS["slice"](context, value, slices, fill_with)


@pass_environment
def _sum(environment: Any, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    total = start
    for value in iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable):
        # As the operator, which checks what it makes.
        total = environment.call_binop(None, "+", total, value)
    return total


@pass_eval_context
def _urlize(context: Any, value: str, *args: Any, **kwargs: Any) -> Any:
    if len(value) > _MAX_LINKED:
        raise TooLarge(f"urlize of more than {_MAX_LINKED:,} characters")
    limit(len(value) * (1 + weight(args) + weight(kwargs)), "urlize")
    return FILTERS["urlize"](context, value, *args, **kwargs)


@pass_environment
def _wordwrap(
    environment: Any,
    s: str,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> Any:
    # At worst a line break behind every character.
    limit(len(s) * (1 + len(wrapstring or "")), "wordwrap")
    return FILTERS["wordwrap"](environment, s, width, break_long_words, wrapstring, break_on_hyphens)


BOUNDED: dict[str, Callable[..., Any]] = {
    "batch": _batch,
    "center": _center,
    "filesizeformat": _filesizeformat,
    "round": _round,
    "slice": _slice,
    "sum": _sum,
    "urlize": _urlize,
    "wordwrap": _wordwrap,
}

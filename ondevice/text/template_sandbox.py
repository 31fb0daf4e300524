"""The Jinja environment that chat templates run in."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jinja2
import markupsafe
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.filters import FILTERS, do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from ondevice.text.template_filters import BOUNDED
from ondevice.text.template_formats import BoundedFormatter, percent, strftime_now, to_json
from ondevice.text.template_values import (
    MAX_BITS,
    MAX_WORK,
    TooLarge,
    joined,
    limit,
    replaced,
    weight,
    whole_numbers,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What cannot grow beyond a small multiple of its input; the others are replaced by bounded ones. Only `random` is
# not there: a prompt must not change by itself.
_FILTERS = _words(
    """abs attr capitalize count d default dictsort first float groupby int items last length list lower map max
    min pprint reject rejectattr reverse select selectattr sort striptags title trim truncate unique upper urlencode
    wordcount xmlattr"""
)
_METHODS: dict[Any, frozenset[str]] = {
    str: _words(
        """strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith removeprefix
        removesuffix upper lower title capitalize casefold swapcase replace join find rfind index rindex count
        isdigit isalpha isalnum isspace isupper islower istitle isnumeric isdecimal isascii isidentifier
        ljust rjust center zfill"""
    ),
    dict: _words("items keys values get copy"),
    list: _words("index count copy"),
    tuple: _words("index count"),
}


class _CheckedCode(CodeGenerator):
    """Compiles what makes new values into calls of the environment, which checks their size."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._call("environment.joined", node.nodes, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.charged(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.charged(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.charged(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def _call(self, name: str, items: Iterable[nodes.Expr], frame: Frame) -> None:
        self.write(f"{name}((")
        for item in items:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")


class _GenerationTag(Extension):
    """`{% generation %}`: marks the assistant's part for training; here it is just its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox where no single operation can take long or make a large value.

    Attribute access is Jinja's own sandbox. On top of it every operator, method and filter that can make
    something larger than its inputs is checked before it runs, as a time limit cannot interrupt it.
    """

    code_generator_class = _CheckedCode
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            finalize=self._printable,
            cache_size=0,
        )
        self._work = threading.local()
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")} | {
            "raise_exception": _raise_exception,
            "strftime_now": strftime_now,
        }
        own: dict[str, Callable[..., Any]] = {
            "join": self._join,
            "replace": lambda text, old, new, count=-1: replaced(self._text(text), str(old), str(new), count),
            "indent": self._indent,
            "format": lambda text, *args, **kwargs: percent(str(text), kwargs or args),
            "string": self._text,
            "tojson": to_json,
            "safe": self._text,
            "escape": lambda value: str(markupsafe.escape(self._text(value))),
        }
        own["e"] = own["forceescape"] = own["escape"]
        own |= BOUNDED
        kept = {"first", "last", "default", "d", "max", "min"}
        self.filters = {name: own.get(name) or FILTERS[name] for name in (*_FILTERS, *own)}
        self.filters = {name: f if name in kept else self._charging(f) for name, f in self.filters.items()}

    def start(self) -> None:
        """Gives this thread a fresh allowance; called before each rendering."""
        self._work.left = MAX_WORK

    def charged(self, value: Any) -> Any:
        """Counts a new value against the allowance.

        Args:
            value: what was made.

        Returns:
            The value.

        Raises:
            TooLarge: it, or all that was made so far, is too large.
        """
        self._work.left -= limit(weight(value), "the template")
        if self._work.left < 0:
            raise TooLarge(f"the template made more than {MAX_WORK:,} characters or items in all")
        return value

    def _charging(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            return self.charged(function(*args, **kwargs))

        return checked

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            limit(weight(value), "a text of a list")
        return str(value)

    def _printable(self, value: Any) -> Any:
        return value if isinstance(value, (str, jinja2.Undefined)) else self._text(value)

    def joined(self, values: Iterable[Any]) -> str:
        """The `~` operator.

        Args:
            values: its operands.

        Returns:
            Their texts in one.
        """
        return str(self.charged(joined(map(self._text, values))))

    def concat(self, parts: Iterable[str]) -> str:
        """Joins the output of a template, block or macro.

        Args:
            parts: its pieces.

        Returns:
            The text.
        """
        return str(self.charged(joined(parts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            whole_numbers(left, right)
            # A product has as many bits as its factors together, a power as many as base x exponent.
            if operator == "**" and isinstance(left, int) and right * left.bit_length() > MAX_BITS:
                raise TooLarge(f"a power with more than {MAX_BITS:,} bits")
            return super().call_binop(context, operator, left, right)
        if operator == "%" and isinstance(left, str):
            return self.charged(percent(left, right))
        if operator == "*":
            times, items = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int):
                size = len(items) if isinstance(items, str) else weight(items)
                limit(size * max(times, 0), "repeating a text or list")
        elif operator == "+":
            limit(weight(left) + weight(right), "adding texts or lists")
        return self.charged(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        found = super().getitem(obj, argument)
        return self.charged(found) if isinstance(argument, slice) else found

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or value.__name__ not in ("format", "format_map"):
            return None
        formatter = BoundedFormatter(self)
        if value.__name__ == "format_map":
            return lambda mapping: self.charged(formatter.format_text(owner, (), dict(mapping)))
        return lambda *args, **kwargs: self.charged(formatter.format_text(owner, args, kwargs))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        kind: Any = next((k for k in (*_METHODS, int, float, bytes) if isinstance(owner, k)), None)
        if kind is None:
            limit(weight(args) + weight(kwargs), "the arguments of a call")
            return super().call(__context, __obj, *args, **kwargs)
        name = __obj.__name__
        if name not in _METHODS.get(kind, ()):
            raise SecurityError(f"{kind.__name__}.{name}() is not available in chat templates")
        if kind is dict:
            return super().call(__context, __obj, *args, **kwargs)
        if name == "join":
            return __self.charged(joined(args[0], str(owner)))
        if name == "replace":
            return __self.charged(replaced(str(owner), *args))
        if name in ("ljust", "rjust", "center", "zfill"):
            limit(args[0] if args and isinstance(args[0], int) else 0, name)
        return __self.charged(super().call(__context, __obj, *args, **kwargs))

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        return joined(map(self._text, values), str(d))

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        size = len(width) if isinstance(width, str) else width
        limit(len(text) + (len(text.splitlines()) + 1) * size, "indent")
        return do_indent(text, width, first, blank)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

"""Chat templates: a conversation to the text that the model was trained on."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import jinja2

from ondevice.errors import TemplateError
from ondevice.text.template_sandbox import TemplateEnvironment
from ondevice.text.template_values import TooLarge, plain

MAX_SECONDS = 5.0
MAX_SOURCE = 256_000

_WAY_OUT = "use --raw to send the prompt without a template"
_ENVIRONMENT = TemplateEnvironment()


def render(
    template: str,
    messages: Sequence[dict[str, Any]],
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool,
    **kwargs: Any,
) -> str:
    """Renders a conversation with a model's chat template, in a sandbox.

    Args:
        template: Jinja source as in tokenizer_config.json.
        messages: dicts with role and content, JSON values only.
        bos_token, eos_token: texts of these tokens, None where the model has none.
        add_generation_prompt: end with the beginning of the assistant's turn.
        kwargs: further variables of the template, such as tools.

    Returns:
        The text, with special tokens as text.

    Raises:
        TemplateError: the template fails, refuses the messages, runs longer than MAX_SECONDS or writes too
            much.
        OptionError: the messages hold something else than JSON values.
    """
    variables: dict[str, Any] = {"tools": None, "documents": None, **kwargs, "messages": list(messages)}
    variables = {name: plain(value, name) for name, value in variables.items()}
    variables |= {name: text for name, text in (("bos_token", bos_token), ("eos_token", eos_token)) if text is not None}
    variables["add_generation_prompt"] = add_generation_prompt
    if len(template) > MAX_SOURCE:
        raise TemplateError(f"chat template: longer than {MAX_SOURCE:,} characters; {_WAY_OUT}")
    return _limited(template, variables)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


class _TimeUp(BaseException):
    """Not an Exception: Jinja's compiler swallows those while it evaluates constants."""


def _limited(source: str, variables: dict[str, Any]) -> str:
    """Compiles and renders under the limits; whatever goes wrong becomes a TemplateError."""
    end = time.monotonic() + MAX_SECONDS

    def check(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise _TimeUp
        return check

    _ENVIRONMENT.start()
    # A trace function sees every line of Python code in this thread, whichever it is; signals would reach the
    # main one only. Single C calls that run long are what TemplateEnvironment refuses.
    previous = sys.gettrace()
    sys.settrace(check)
    try:
        compiled = _compiled(source)
        # An error inside the trace function switches it off, and the compiler swallows errors in constants.
        sys.settrace(check)
        return compiled.render(variables)
    except _TimeUp:
        problem = f"ran longer than {MAX_SECONDS:g} s"
    except TooLarge as error:
        problem = f"refused: {error}"
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {error.message}"
    except jinja2.TemplateError as error:
        problem = error.message or type(error).__name__
    except Exception as error:  # a template can fail in as many ways as code can
        problem = f"{type(error).__name__}: {error}"
    finally:
        sys.settrace(previous)
    raise TemplateError(f"chat template: {problem[:500]}; {_WAY_OUT}")

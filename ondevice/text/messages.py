"""Messages of a conversation, in the one form that chat templates of text models read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ondevice.errors import OptionError


def flat_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checks messages and joins the parts of their contents.

    Args:
        messages: dicts with "role" and "content"; content is a text, None, or a list of text parts.

    Returns:
        New dicts, contents as text; parts are joined by a line break.

    Raises:
        OptionError: a message is not of that form.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise OptionError("messages: a list of {'role': ..., 'content': ...} is needed, with at least one")
    flat = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise OptionError(f"{where}: a dict with a text as 'role' is needed")
        copy = dict(message)
        content = copy.get("content")
        if isinstance(content, (list, tuple)):
            copy["content"] = "\n".join(_part(part, where) for part in content)
        elif content is not None and not isinstance(content, str):
            raise OptionError(f"{where}.content: a text or a list of parts is needed, not {content!r:.60}")
        flat.append(copy)
    return flat


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise OptionError(f"{where}.content: parts of type 'text' only, not {kind!r}; this model reads text")

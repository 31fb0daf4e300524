"""The commands that begin with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ondevice.commands.generate import rates
from ondevice.errors import OptionError
from ondevice_chat.conversation import Conversation


class Leave(Exception):
    """The user wants to go."""


def run(line: str, conversation: Conversation) -> str:
    """Runs a command.

    Args:
        line: "/name arguments".

    Returns:
        What to show.

    Raises:
        OptionError: no such command, or not so.
        Leave: for /exit.
    """
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean /{close[0]}? " if close else ""
        known = " ".join(f"/{command}" for command in COMMANDS)
        raise OptionError(f"no command /{name}; {meant}known are {known}; a space before the slash sends it as text")
    action, takes, _ = COMMANDS[name]
    if rest.strip() and not takes:
        raise OptionError(f"/{name} takes nothing after it")
    return action(conversation, rest.strip())


def _help(conversation: Conversation, _: str) -> str:
    lines = [f"/{name + ' ' + takes:<16}  {text}" for name, (_, takes, text) in COMMANDS.items()]
    return "\n".join([*lines, '"""               begins and ends a message of several lines'])


def _clear(conversation: Conversation, _: str) -> str:
    conversation.clear()
    return "the conversation starts anew"


def _system(conversation: Conversation, text: str) -> str:
    if text:
        conversation.system = None if text == "none" else text
    return "no system message" if conversation.system is None else f"system message: {conversation.system}"


def _set(conversation: Conversation, text: str) -> str:
    key, _, value = text.partition(" ")
    if text and not value.strip():
        raise OptionError(f"/set {key} needs a value; now: {conversation.settings()}")
    if text:
        conversation.set(key, value.strip())
    return conversation.settings()


def _stats(conversation: Conversation, _: str) -> str:
    session = conversation.session
    room = f"context {session.used} of {session.context} tokens used"
    if not conversation.reason:
        return f"nothing answered yet; {room}"
    return f"{rates(conversation.stats, conversation.reason)}\n{room}"


def _exit(conversation: Conversation, _: str) -> str:
    raise Leave


COMMANDS: dict[str, tuple[Callable[[Conversation, str], str], str, str]] = {
    "help": (_help, "", "this list"),
    "clear": (_clear, "", "forgets what was said"),
    "system": (_system, "TEXT", "sets the system message (none takes it away)"),
    "set": (_set, "KEY VALUE", "changes a setting; alone, it shows all"),
    "stats": (_stats, "", "counts and rates of the last answer"),
    "exit": (_exit, "", "leaves"),
}
"""Name -> what it does, what it takes, its line of help."""

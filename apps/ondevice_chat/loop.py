"""The chat itself: reads messages and commands, shows answers. What reads and writes is given to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from ondevice.errors import OndeviceError
from ondevice_chat.conversation import Conversation
from ondevice_chat.slash import Leave, run

QUOTES = '"""'
FIRST, MORE = "> ", ". "

ReadLine = Callable[[str], str]
Write = Callable[[str], None]


def chat(conversation: Conversation, read_line: ReadLine, write: Write) -> None:
    """Talks until the user leaves.

    Args:
        conversation: with whom.
        read_line: shows a prompt and returns a line. Raises EOFError at the end, KeyboardInterrupt at Ctrl+C.
        write: shows text.
    """
    interrupted = False
    while True:
        try:
            message = read_message(read_line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            write("Ctrl+C again, or /exit, leaves.\n")
            continue
        interrupted = False
        if not message.strip():
            continue
        try:
            if message.startswith("/"):
                write(run(message.rstrip(), conversation) + "\n")
            else:
                _answer(conversation, message, write)
        except Leave:
            return
        except OndeviceError as e:
            write(f"error: {e}\n")


def read_message(read_line: ReadLine) -> str:
    """One line, or the lines between triple quotes."""
    line = read_line(FIRST)
    start = line.lstrip()
    if not start.startswith(QUOTES):
        return line
    text = start[len(QUOTES) :]
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + read_line(MORE)
    return text.rstrip()[: -len(QUOTES)].strip("\n")


def _answer(conversation: Conversation, message: str, write: Write) -> None:
    """Shows an answer; Ctrl+C ends it and keeps what there is."""
    ending = ""
    try:
        with closing(conversation.ask(message)) as pieces:  # type: ignore[type-var]
            for text in pieces:
                write(text)
                ending = text[-1:] or ending
    except KeyboardInterrupt:
        pass
    if ending != "\n":
        write("\n")
    if conversation.note:
        write(f"[{conversation.note}]\n")

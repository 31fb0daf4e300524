"""The line editor of the chat: history, editing keys, and where they are kept."""

from __future__ import annotations

from pathlib import Path

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from ondevice.checkpoint import store


class LineReader:
    """Reads lines with history. Ctrl+C in a line that holds text only clears the line."""

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(history=_history())

    def __call__(self, prompt: str) -> str:
        """Shows a prompt and returns the line."""
        while True:
            try:
                return self._session.prompt(prompt)
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    raise


def _history() -> History:
    path = Path(store.root()) / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as e:
        click.echo(f"the history will not be kept: {path}: {e.strerror}", err=True)
        return InMemoryHistory()
    return FileHistory(str(path))

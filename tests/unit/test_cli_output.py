"""What the commands write: progress on stderr, text made safe for a terminal, sizes."""

from __future__ import annotations

import io
import sys

import pytest

from ondevice.commands import progress as module
from ondevice.commands.progress import reporting, size
from ondevice.commands.terminal import safe, table


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_what_is_soon_over_is_not_reported(clock, capsys):
    with reporting() as progress:
        for i in range(10):
            progress(i, 10, "loading")
            clock.now += 0.05
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_long_topic_gets_one_line(clock, capsys):
    with reporting() as progress:
        for i in range(10):
            progress(i, 10, f"compiling kernel {i}")
            clock.now += 0.5
        for i in range(5):
            progress(i * 10**7, 93 * 10**6, "downloading model")
            clock.now += 2
        progress(12, 12, "")
    assert capsys.readouterr().err == "compiling kernel 2 (2 of 10) ...\ndownloading model (93 MB) ...\n"


def test_on_a_terminal_a_bar_is_drawn_and_taken_away(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    with reporting() as progress:
        progress(1, 8, "compiling norm")
        clock.now += 2
        progress(2, 8, "compiling rope")
    assert "compiling rope" in stderr.getvalue() and "2 / 8" in stderr.getvalue()
    assert stderr.getvalue().rstrip().endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (98362432, "98.4 MB"),
        (999_600, "1 MB"),
        (999_499_999, "999 MB"),
        (123456789, "123 MB"),
        (7_500_000_000, "7.5 GB"),
        (2 * 10**12, "2 TB"),
    ],
)
def test_sizes(nbytes, text):
    assert size(nbytes) == text


def test_a_model_cannot_steer_the_terminal():
    assert safe("a\x1b[31mb\x07\x9b2J\r\nc\td\x7f") == "a�[31mb��2J�\nc\td�"
    assert safe("naïve 🙂 日本") == "naïve 🙂 日本"


def test_tables_align():
    assert table({"a": 1, "long": 2}, "  ") == "  a     1\n  long  2"
    assert table({}) == ""

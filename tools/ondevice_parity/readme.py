"""The block of a README that the parity command writes, between two marks."""

from __future__ import annotations

from pathlib import Path

from ondevice_parity.parity import Report, lines

COMMAND = "ONDEVICE_TRITON_INTERPRET=1 ondevice doctor --parity --write README.md"
BEGIN = f"<!-- parity: written by `{COMMAND}` -->"
END = "<!-- end of parity -->"


def block(report: Report) -> str:
    """What stands between the marks, with them."""
    return "\n".join([BEGIN, "", *lines(report), "", END])


def rewrite(path: Path, report: Report) -> None:
    """Puts a report in the place of the one that a file has.

    Raises:
        ValueError: the file has no marks, or more than one pair.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: no place for the table; put one line {BEGIN!r} and after it one line {END!r}")
    before, rest = text.split(BEGIN)
    path.write_text(before + block(report) + rest.split(END)[1], encoding="utf-8")

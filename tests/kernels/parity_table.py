"""Writes the README's table: `ONDEVICE_TRITON_INTERPRET=1 python -m tests.kernels.parity_table README.md`.

All homes that `ondevice doctor --parity` runs, and Metal's in what stands in for an Apple GPU here: the emulator of
tests/msl. Takes minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

from ondevice.commands.progress import reporting
from ondevice_parity import homes, parity

BEGIN = "<!-- parity: written by `ONDEVICE_TRITON_INTERPRET=1 python -m tests.kernels.parity_table README.md` -->"
END = "<!-- end of parity -->"


def _run() -> tuple[parity.Report, bool]:
    """The report, and whether Metal's kernels ran on a GPU."""
    from tests.kernels.metal_home import HOME, running
    from tests.msl.emulator import metal_kernels

    here = homes.Entry(lambda: None, lambda: HOME)
    with metal_kernels() as kernels, running(), mock.patch.dict(homes.HOMES, {"metal": here}), reporting() as progress:
        return parity.run(progress=progress), kernels.on_gpu


def rewritten(text: str, report: parity.Report, on_gpu: bool) -> str:
    """A README's text with a report in the place of the one that it has.

    Raises:
        ValueError: it has no marks, or more than one pair.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"no place for the table; put one line {BEGIN!r} and after it one line {END!r}")
    before, rest = text.split(BEGIN)
    where = "an Apple GPU" if on_gpu else "the emulator of [tests/msl](tests/msl)"
    block = [BEGIN, "", *parity.lines(report), "", f"Metal's kernels ran in {where}.", "", END]
    return before + "\n".join(block) + rest.split(END)[1]


def main(args: list[str]) -> int | str:
    """0, or what is wrong; the file is left as it was then."""
    if len(args) != 1 or not (path := Path(args[0])).is_file():
        return "give one file, which has the marks"
    report, on_gpu = _run()
    if not report.passed or report.obstacles:
        return "\n".join(parity.lines(report))
    try:
        path.write_text(rewritten(path.read_text(encoding="utf-8"), report, on_gpu), encoding="utf-8")
    except ValueError as e:
        return f"{path}: {e}"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

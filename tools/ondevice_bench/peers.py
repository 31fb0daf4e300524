"""Runs ours and llama.cpp in turn, never at the same time, and prints ratios of medians with their spread.

    python -m ondevice_bench.peers smollm2 --llama-python peers/bin/python --rounds 5 --picture ratios.svg

The peer lives in a virtual environment of its own, which holds two packages of PyPI, llama-cpp-python (compiled for
this processor) and gguf (which writes GGUF files of other types and shapes to compare on):

    python3 -m venv peers
    CMAKE_ARGS=-DGGML_NATIVE=ON peers/bin/pip install llama-cpp-python gguf

Without a peer, `ondevice bench` measures ours alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import click

from ondevice.defaults import DEFAULT_MODEL
from ondevice.errors import OndeviceError, OptionError
from ondevice.machine import BANDWIDTH_BYTES, cpu_name, default_threads
from ondevice_bench.cases import Case, parse
from ondevice_bench.contenders import OURS, Contender, llamas, ours
from ondevice_bench.disturb import KINDS, disturbed
from ondevice_bench.picture import svg
from ondevice_bench.ratios import Comparison, compare, median
from ondevice_bench.report import markdown

QUIET, COLD = "quiet", "cold"
LOAD = 0.3
"""Load average from which a machine is not quiet."""
SWITCH = click.Choice(["on", "off"])
FILE = click.Path(dir_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(slots=True)
class Results:
    """All samples.

    Args:
        samples: by (condition, test, contender), a list for each round.
        about: what each contender says of itself: version, bytes and parameters.
        load: average of the machine before, in busy threads.
    """

    samples: dict[tuple[str, str, str], list[list[float]]] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    def add(self, condition: str, contender: str, answer: dict[str, Any]) -> None:
        """Takes the answer of one process."""
        for test, samples in answer.pop("samples").items():
            self.samples.setdefault((condition, test, contender), []).append(samples)
        bits = 8 * answer["bytes"] / answer["parameters"]
        self.about[contender] = {**answer, "bits_per_weight": round(bits, 3)}

    def comparisons(self) -> list[Comparison]:
        """Ours against the best variant of the peer, for each condition and test."""
        found = []
        for condition, test in dict.fromkeys(key[:2] for key in self.samples):
            mine = {name: rounds for (c, t, name), rounds in self.samples.items() if (c, t) == (condition, test)}
            found.append(compare(condition, test, mine.pop(OURS), mine))
        return found


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "))
@click.argument("model", default=DEFAULT_MODEL, envvar="ONDEVICE_MODEL")
@click.option("--llama-python", type=EXISTING, help="The Python that has llama-cpp-python; needed.")
@click.option(
    *("--llama-model", "models"),
    type=EXISTING,
    multiple=True,
    help="GGUF file for the peer; of several, the fastest counts.  [default: MODEL's file]",
)
@click.option("--flash", type=SWITCH, multiple=True, default=["on", "off"], help="Flash attention; the faster counts.")
@click.option("--repack", type=SWITCH, multiple=True, default=["on"], help="Weights repacked for the processor.")
@click.option("--tests", default="tg128,tg128@d4096,pp512,pp4096", show_default=True, help="As `ondevice bench` names.")
@click.option("-t", "--threads", type=click.IntRange(1), help="Of each program.  [default: one per usable core]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Times that each has its turn.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=2, show_default=True, help="Per turn and test.")
@click.option(
    *("--disturb", "disturbances"),
    type=click.Choice(KINDS),
    multiple=True,
    help="Also with another program on a core: a Python loop, the same niced, or NumPy in memory.",
)
@click.option("--cold", is_flag=True, help="Also with the weights pushed out of the cache before each step.")
@click.option("--json", "json_file", type=FILE, help="Write all samples there.")
@click.option("--picture", type=FILE, help="Write the ratios there as SVG.")
def peers(
    model: str,
    llama_python: Path | None,
    models: tuple[Path, ...],
    flash: tuple[str, ...],
    repack: tuple[str, ...],
    tests: str,
    threads: int | None,
    rounds: int,
    repetitions: int,
    disturbances: tuple[str, ...],
    cold: bool,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    if llama_python is None:
        raise click.UsageError("Give the peer's Python with --llama-python PATH; --help says how to make one.")
    try:
        cases = parse(tests)
        rivals = llamas(llama_python, models or (_gguf(model),), flash, repack)
        conditions = [QUIET, *([COLD] if cold else []), *disturbances]
        threads = threads or default_threads()
        results = Results()
        turns = list(product(conditions, [ours(model), *rivals]))
        for done in range(rounds):
            for i, (condition, contender) in enumerate(turns, 1 + done * len(turns)):
                click.echo(f"[{i}/{rounds * len(turns)}] {condition}: {contender.name} ...", err=True)
                results.add(condition, contender.name, _run(contender, condition, cases, threads, repetitions))
            if json_file is not None:  # after each round, so that a run cut short leaves what it has
                json_file.write_text(json.dumps(document(results, model, threads), indent=1) + "\n")
    except OndeviceError as e:
        raise click.ClickException(str(e)) from e
    click.echo(text(results, threads))
    if picture is not None:
        title = f"Tokens per second of ondevice / llama.cpp: {Path(model).name}, {threads} threads, {cpu_name()}"
        picture.write_text(svg(results.comparisons(), title))


def _gguf(model: str) -> Path:
    """The file that ours reads, where the peer can read it too."""
    from ondevice.model import find

    path = find(model)
    if path.suffix.lower() != ".gguf":
        raise OptionError(f"{path} is no GGUF file, which llama.cpp needs; name one with --llama-model")
    return path


def _run(contender: Contender, condition: str, cases: list[Case], threads: int, repetitions: int) -> dict[str, Any]:
    with disturbed(condition if condition in KINDS else ""):
        return contender.run(cases, threads, repetitions, BANDWIDTH_BYTES if condition == COLD else 0)


def text(results: Results, threads: int) -> str:
    """Two tables: the contenders, and the ratios with what a disturbance leaves of each one's quiet speed."""
    about = [
        {"program": name, "bits/weight": f"{a['bits_per_weight']:.2f}", "version": a["version"]}
        for name, a in results.about.items()
    ]
    rows = []
    for c in results.comparisons():
        mine, theirs = (results.samples[QUIET, c.test, name] for name in (OURS, c.peer))
        kept = f"{100 * c.ours / median(mine):.0f} % / {100 * c.theirs / median(theirs):.0f} %"
        rows.append(
            {
                "test": c.test,
                "machine": c.condition,
                "ours tok/s": f"{c.ours:.1f}",
                "peer tok/s": f"{c.theirs:.1f}",
                "ratio": f"{c.ratio:.2f}",
                "rounds": f"{c.low:.2f}-{c.high:.2f}",
                "of quiet": "-" if c.condition == QUIET else kept,
                "peer's best": c.peer,
            }
        )
    tables = [markdown(about, ("program", "version")), markdown(rows, ("test", "machine", "peer's best"))]
    notes = f"{threads} threads each; medians; a ratio above 1: ours is faster"
    if results.load > LOAD:
        notes += (
            f"\nThe machine was not quiet (load average {results.load:.1f} before): a shared core slows programs that "
            "wait for each other differently, so run this again when nothing else runs."
        )
    return "\n\n".join([*tables, notes])


def document(results: Results, model: str, threads: int) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        "model": model,
        "threads": threads,
        "cpu": cpu_name(),
        "load_before": results.load,
        "contenders": results.about,
        "comparisons": [asdict(c) for c in results.comparisons()],
        "samples": [
            {"condition": condition, "test": test, "contender": name, "rounds": rounds}
            for (condition, test, name), rounds in results.samples.items()
        ],
    }


if __name__ == "__main__":
    peers()

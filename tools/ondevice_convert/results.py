"""`python -m ondevice_convert.results MODEL --text FILE -o FILE.md`: quality against speed of all methods."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ondevice import __version__
from ondevice.checkpoint import open_checkpoint
from ondevice.commands.progress import reporting
from ondevice.defaults import DEFAULT_MODEL
from ondevice.errors import OptionError
from ondevice.machine import cpu_name
from ondevice.model import find
from ondevice.spec import ModelSpec
from ondevice_bench import chart
from ondevice_bench.report import markdown
from ondevice_convert.methods import KINDS, parse
from ondevice_convert.quality import Quality
from ondevice_convert.samples import Samples, gather
from ondevice_convert.search import POSITIONS, told_name
from ondevice_convert.speed import Speed
from ondevice_convert.texts import Texts, read_text, split_text
from ondevice_convert.trial import Trial

METHODS = {
    "cats, as published": "cats:first=published,density={}",
    "cats, either factor, weighed": "cats:density={}",
    "teal": "teal:density={}",
    "lte, blocks of 32": "lte:density={}",
    "d2dmoe, experts of 32": "d2dmoe:density={}",
    "polar, heads": "polar:heads={}",
}
DRAWN_UP_TO = 0.6
"""Largest rise that is drawn: beyond it a model is of no use."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one density."""

    method: str
    option: str
    quality: Quality
    speed: Speed
    oracle_share: float


@click.command()
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="UTF-8 text.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Markdown to write."
)
@click.option("--tokens", default=100_000, show_default=True, help="To calibrate on.")
@click.option("--windows", default=16, show_default=True, help="Of the unseen text, from its end, to measure on.")
@click.option("--densities", default="0.9,0.8,0.7,0.6,0.5,0.4,0.3", show_default=True, help="With commas between.")
@click.option("--methods", default="", help="Only those whose names begin so, with commas between.")
@click.option("-t", "--threads", type=click.IntRange(1), help="Of the CPU backend.")
def results(
    model: str, text: Path, output: Path, tokens: int, windows: int, densities: str, methods: str, threads: int | None
) -> None:
    """Convert MODEL by every method that applies at 30 to 90 %, and tabulate quality against decode speed."""
    if not output.absolute().parent.is_dir():
        raise click.UsageError(f"-o {output}: there is no such folder.")
    chosen = {
        name: pattern
        for name, pattern in METHODS.items()
        if not methods or name.startswith(tuple(part.strip() for part in methods.split(",")))
    }
    with reporting() as progress, open_checkpoint(find(model, progress)) as base:
        content, sha256 = read_text(text)
        texts = split_text(content, sha256, text, base.tokenizer(), tokens, base.spec.context_length)
        trial = Trial.of(base, "cpu", threads, progress)
        places = dict.fromkeys(
            place for pattern in chosen.values() for place in KINDS[parse(pattern.format(0.5)).method].places
        )
        samples = gather(trial.dense, texts.fit, tuple(places), POSITIONS, progress)
        rows: list[Row] = []
        for name, pattern in chosen.items():
            try:
                rows += _of_method(
                    trial, samples, texts, windows, name, [pattern.format(d.strip()) for d in densities.split(",")]
                )
            except OptionError as e:
                click.echo(f"{name}: does not apply: {e}", err=True)
        page = _page(model, base.spec, texts, windows, rows, output)
    output.with_suffix(".svg").write_text(_picture(model, rows), encoding="utf-8")
    output.write_text(page, encoding="utf-8")
    click.echo(page)


def _of_method(
    trial: Trial, samples: Samples, texts: Texts, windows: int, name: str, asked: Sequence[str]
) -> Iterator[Row]:
    options = [parse(text) for text in asked]
    fits = [KINDS[option.method].fit(trial.base, samples, option, trial.progress) for option in options]
    decoders = [trial.decoder(fitted) for fitted in fits]
    unseen = texts.unseen[-windows * texts.window :]
    qualities = trial.quality(decoders, unseen, texts.window, f"of {name}")
    speeds = trial.speeds(decoders)[1:]
    for option, fitted, quality, speed in zip(options, fits, qualities, speeds):
        shares = [layer.oracle_share for layer in fitted.layers]
        yield Row(name, option.text, quality, speed, sum(shares) / max(1, len(shares)))


def _page(model: str, spec: ModelSpec, texts: Texts, windows: int, rows: Sequence[Row], output: Path) -> str:
    command = shlex.join(["python", "-m", "ondevice_convert.results", *(_plain(a) for a in sys.argv[1:])])
    tokens = min(windows * texts.window, len(texts.unseen))
    table = markdown([_cells(row) for row in rows], left=("method",))
    return f"""# Quality against speed

{told_name(model)} ({spec.n_layers} layers, {spec.d_ff} neurons each), ondevice {__version__}, {cpu_name()}. Fitted on
{len(texts.fit)} tokens of a text, measured on {tokens} others from its end, in windows of {texts.window}. Made by

```
{command}
```

"kept" is what the unseen text kept of FFN neurons (cats, lte, d2dmoe), inputs of linears (teal) or heads (polar).
"rise" is of perplexity over the dense model, with its upper 95 % bound from paired windows. Speed is decoding one
sequence at an empty context, in turn with the dense model, with `--plan sparse`, so that every layer skips even where
that is slower. "oracle" is the mean share of an oracle's benefit over chance that the predictor keeps.

{table}

![Rise of perplexity over speed]({output.with_suffix(".svg").name})
"""


def _plain(argument: str) -> str:
    """Without the folder that a file lies in: that is nobody else's."""
    return Path(argument).name if "/" in argument and Path(argument).suffix in (".txt", ".gguf", ".md") else argument


def _cells(row: Row) -> dict[str, str]:
    quality, speed = row.quality, row.speed
    upper = "" if quality.rise_upper is None else f"{100 * quality.rise_upper:.1f} %"
    return {
        "method": row.method,
        "asked for": row.option.rpartition("=")[2],
        "kept": ", ".join(f"{part:.3f}" for part in quality.density.values()),
        "rise": f"{100 * quality.rise:.2f} %",
        "at most": upper,
        "KL": f"{quality.kl:.4f}",
        "same top 1": f"{100 * quality.agreement:.1f} %",
        "tok/s": f"{speed.tokens_per_second:.0f}",
        "of dense": f"{speed.speedup:.3f}",
        "MB a token": f"{speed.bytes_per_token / 1e6:.1f}",
        "oracle": f"{row.oracle_share:.3f}",
    }


def _picture(model: str, rows: Sequence[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row.method for row in rows):
        points = [(r.speed.speedup, 100 * r.quality.rise) for r in rows if r.method == name]
        drawn = [point for point in points if point[1] <= 100 * DRAWN_UP_TO]
        if drawn:
            lines.append(chart.Line(name, drawn))
    title = f"{model}: points from 90 % kept down to 30 %"
    return chart.svg(lines, title, "speed, 1 = dense", "rise of perplexity in %", mark=0.0)


if __name__ == "__main__":
    results()

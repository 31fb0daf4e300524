"""`ondevice convert`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from ondevice.commands.options import json_option
from ondevice.commands.progress import reporting

AUTO = "auto"
DEFAULT_BUDGET = 0.01


class Percent(click.ParamType[float]):
    """A part, written in percent: 1% or 0.5%."""

    name = "N%"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """0.01 of "1%"."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", str(value).strip())
        if found is None or not 0 < float(found[1]) <= 100:
            self.fail(f"{value!r} is no percentage above 0 and up to 100; write 1% or 0.5%.", param, ctx)
        return float(found[1]) / 100


@click.command("convert")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to make; must not exist.")
@click.option(
    "--bits",
    type=click.FloatRange(4, 8),
    help="Of weights: 4, 5, 6 or 8; 4.5 and the like mix them, with more bits where it hurts.  [default: as they are]",
)
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="Inputs with one scale.  [default: 64]")
@click.option("--sparsity", metavar="METHOD[:KEY=VALUE,...]", help="How to skip work; see below.  [default: dense]")
@click.option("--budget", type=Percent(), help="Rise of perplexity that --sparsity auto may cost.  [default: 1%]")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text like what the model will be used for.  [default: the model writes one]",
)
@click.option(
    "--tokens",
    type=click.IntRange(1024),
    default=100_000,
    show_default=True,
    help="Of the text to calibrate on, spread evenly over it.",
)
@click.option("--seed", default=0, show_default=True, help="Of the text that the model writes, where none is given.")
@click.option("-t", "--threads", type=click.IntRange(1), envvar="ONDEVICE_THREADS", help="Of the CPU backend.")
@json_option
def convert(
    source: str,
    output: Path,
    bits: float | None,
    group_size: str | None,
    sparsity: str | None,
    budget: float | None,
    text: Path | None,
    tokens: int,
    seed: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Convert a model to a folder of safetensors: with other bits, or such that it skips work.

    SOURCE is org/repo of the Hub, a name in the store, a GGUF file or a folder. No GPU is needed and nothing of the
    model is trained; dense results load in mlx-lm too. What was done and what it cost is in REPORT.md and report.json
    of the folder: perplexity, KL and agreement on text that nothing was fitted on, speed, and what was refused.

    \b
    Methods:
      auto                      relu's zeros, single neurons, a sketched head: the fastest within --budget here
      cats:density=0.5          neurons by one of their factors (first=best|gate|up|published)
      teal:density=0.5          inputs of linears by their size (linears=q+k+v+o+gate+up+down)
      lte:density=0.5           groups of neurons by a linear router (block=32, order=cofiring|clustered|model)
      d2dmoe:tau=0.1            experts by their predicted norm (block=32, width=128, or density=0.5 for tau)
      polar:heads=0.7           heads for each sequence, and neurons of relu models (recall=0.99, batches=1+8+32)

    --budget is a promise: the upper end of a one-sided 95 % interval of the rise of perplexity over the dense model
    (with --bits, over that model rounded), from the differences of windows of unseen text, lies below it. Skipping that
    is not faster on this machine is refused, and the report says by how much.

    A conversion that was killed goes on when it is called again in the same way. While it runs, what it has found lies
    in hidden files beside the folder.

    \b
    Examples:
      ondevice convert smollm2 -o smol-8bit --bits 8 --group-size 32
      ondevice convert smollm2 -o smol-fast --sparsity auto --budget 2% --text notes.txt
      ondevice convert smollm2 -o smol-70 --sparsity cats:density=0.7 --text notes.txt
    """
    from ondevice_convert.conversion import Job
    from ondevice_convert.conversion import convert as run
    from ondevice_convert.methods import parse

    if budget is not None and sparsity is not None and not sparsity.startswith(AUTO):
        raise click.UsageError(f"--budget chooses the method, and --sparsity {sparsity} names one; drop one of them.")
    if budget is not None and sparsity is None:
        sparsity = AUTO
    method = None if sparsity is None else parse(sparsity)
    if bits is None and group_size is not None:
        raise click.UsageError(f"--group-size {group_size} is of weights that are rounded anew; add --bits.")
    with reporting() as progress:
        job = Job(
            *(source, output, bits, None if group_size is None else int(group_size), method),
            *(DEFAULT_BUDGET if budget is None else budget, text, tokens, seed, threads),
        )
        run(job, progress)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    click.echo(json.dumps(report, indent=1) if as_json else _for_people(output, report))


def _for_people(folder: Path, report: dict[str, Any]) -> str:
    lines = [str(folder)]
    if "chosen" in report["made"]:
        lines.append(f"chosen: {report['made']['chosen']}")
    for name, quality in report["quality"].items():
        upper = quality["rise_upper"]
        bound = "" if upper is None else f", at most {100 * upper:.2f} % (95 %)"
        lines.append(f"{name}: perplexity {quality['perplexity']:.3f}, {100 * quality['rise']:+.2f} %{bound}")
    if report["speed"]:
        speed = report["speed"]["converted"]
        interval = f"{speed['low']:.3f} to {speed['high']:.3f}"
        lines.append(f"decoding: {speed['speedup']:.3f} times as fast as before ({interval}), in turn on this machine")
    lines += [f"note: {note}" for note in report["notes"]]
    lines.append(f"more: {folder / 'REPORT.md'}")
    return "\n".join(lines)

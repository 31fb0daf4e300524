"""`ondevice eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ondevice.commands.options import (
    engine_options,
    json_option,
    model_argument,
    sketch_option,
    sparsity_options,
    tile_cache_option,
)
from ondevice.commands.progress import reporting
from ondevice.defaults import BACKENDS
from ondevice.errors import OndeviceError, OptionError

if TYPE_CHECKING:
    from ondevice.model import Model
    from ondevice_eval.scores import Scores

TOP = 40
"""Words of exact logits under a sketched head, unless asked otherwise: as many as --top-k 40 draws from."""
PARTS = {"ffn": "ffn_density", "heads": "head_density", "inputs": "input_density", "words": "word_density"}
"""What may be left out, in the words of `Ops.counts`, and its key in the report."""


@click.command("eval")
@model_argument
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="UTF-8 text.")
@click.option("--tokens", type=click.IntRange(2), help="Use the first so many tokens.  [default: all]")
@click.option("--window", type=click.IntRange(2), default=1024, show_default=True, help="Tokens of a window.")
@click.option("--against", metavar="MODEL", help="Compare with this model: KL(it || MODEL), top-1 agreement.")
@click.option("--against-backend", type=click.Choice(BACKENDS), help="Compare with this backend.")
@click.option("--by-token", is_flag=True, help="Compute token by token, as generation does; slower.")
@engine_options
@sparsity_options
@sketch_option
@click.option("--top", type=click.IntRange(1), help=f"With a sketched head: words of exact logits.  [default: {TOP}]")
@tile_cache_option
@json_option
def evaluate(
    model: str,
    text: Path,
    tokens: int | None,
    window: int,
    against: str | None,
    against_backend: str | None,
    by_token: bool,
    backend: str,
    threads: int | None,
    kv_bits: int | None,
    tau: float | None,
    strict: bool,
    dense: bool,
    plan: str,
    sketch_head: bool | None,
    top: int | None,
    no_tile_cache: bool,
    as_json: bool,
) -> None:
    """Measure a model's perplexity on a text, in windows that do not overlap.

    The first token of each window is not scored and no special tokens are added. Standard errors take windows as the
    independent units; so does the upper bound of the perplexity's rise over that of --against, from the difference in
    each window. MODEL is a name in the store or a path; the default is smollm2.

    With a sketched head, words beyond the --top likeliest may have the sketch's score, as when decoding; the model of
    --against has the head that it asks for, the other backend of --against-backend a whole one.
    """
    from ondevice.model import load
    from ondevice.sparsity.stats import densities
    from ondevice_eval.evaluation import evaluate as score

    content = _read(text)
    with reporting() as progress:
        common: dict[str, Any] = {"threads": threads, "tile_cache": not no_tile_cache, "progress": progress}
        own: dict[str, Any] = {"tau": tau, "strict": strict, "dense": dense, "plan": plan}
        loaded = load(model, backend=backend, sketch_head=sketch_head, kv_bits=kv_bits, **own, **common)
        if top is not None and loaded.decoder.sketch is None:
            raise OptionError(f"--top {top} is of a sketched head, which {model} does not have: add --sketch-head")
        other = None
        if against is not None or against_backend is not None:
            settings = {} if against else {**own, "sketch_head": False}
            other = load(against or model, backend=against_backend or backend, **settings, **common)
            _same_vocabulary(loaded, other)
        ids = loaded.tokenizer.encode(content, add_special=False)[:tokens]
        decoder = None if other is None else other.decoder
        if loaded.spec.sparsity is not None and not loaded.spec.sparsity.in_prompts and not by_token:
            click.echo(f"{loaded.spec.sparsity.name} skips work in decoding only: computing token by token", err=True)
            by_token = True
        before = loaded.decoder.ops.counts()
        scores = score(loaded.decoder, ids, window, decoder, by_token, progress, top or TOP)
    kept = densities(loaded.spec, before, loaded.decoder.ops.counts())
    report = _report(scores, kept, compared=other is not None)
    click.echo(json.dumps(report, indent=1) if as_json else _for_people(report))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise OndeviceError(f"{path}: not UTF-8 at byte {e.start}; convert it first") from e


def _same_vocabulary(a: Model, b: Model) -> None:
    """Equal ids must mean equal tokens, or comparing distributions over them means nothing."""
    sizes = a.spec.vocab_size, b.spec.vocab_size
    same = sizes[0] == sizes[1] and all(
        a.tokenizer.token_bytes(i) == b.tokenizer.token_bytes(i) for i in range(sizes[0])
    )
    if not same:
        raise OptionError(
            f"{a.name} and {b.name} have different vocabularies, so they cannot be compared token by token"
        )


def _report(scores: Scores, density: dict[str, float], compared: bool) -> dict[str, Any]:
    perplexity, error = math.exp(scores.nll), scores.nll_stderr
    both = scores if compared else None
    return {
        "tokens": scores.tokens,
        "windows": len(scores.windows),
        "nll": scores.nll,
        "nll_stderr": error,
        "perplexity": perplexity,
        "stderr": None if error is None else perplexity * error,
        "perplexity_rise": both and both.rise,
        "perplexity_rise_upper95": both and both.rise_upper(),
        "kl": both and both.kl,
        "top1_agreement": both and both.agreement,
        **{key: density.get(part, 1.0) for part, key in PARTS.items()},
    }


def _for_people(report: dict[str, Any]) -> str:
    error = report["stderr"]
    spread = "(one window: no standard error)" if error is None else f"± {error:.3f} (standard error over windows)"
    lines = [
        f"perplexity  {report['perplexity']:.3f} {spread}",
        f"nll         {report['nll']:.5f} nats per token, {report['tokens']} tokens in {report['windows']} windows",
    ]
    if report["kl"] is not None:
        upper = report["perplexity_rise_upper95"]
        bound = "(one window: no bound)" if upper is None else f"(below {100 * upper:+.3f} % with 95 % confidence)"
        lines.append(f"rise        {100 * report['perplexity_rise']:+.3f} % of perplexity {bound}")
        lines.append(f"KL          {report['kl']:.3e} nats per token")
        lines.append(f"top-1       {100 * report['top1_agreement']:.3f} % agreement")
    kept = [f"{100 * report[key]:.1f} % of {part}" for part, key in PARTS.items() if report[key] < 1]
    return "\n".join([*lines, *([f"kept        {', '.join(kept)}"] if kept else [])])

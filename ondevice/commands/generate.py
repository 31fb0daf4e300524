"""`ondevice generate`: one answer, or a batch of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import click

from ondevice.commands.options import (
    TEXT,
    context_option,
    engine_options,
    json_option,
    model_argument,
    sampling,
    sampling_options,
    sketch_option,
    sparsity_options,
    tile_cache_option,
)
from ondevice.commands.progress import reporting
from ondevice.commands.terminal import read_stdin, write

if TYPE_CHECKING:
    from ondevice.generation.batch import Stats
    from ondevice.model import Answer, Model


@click.command()
@model_argument
@click.option("-p", "--prompt", type=TEXT, multiple=True, help="The prompt; - reads stdin; repeat for a batch.")
@sampling_options(max_tokens=256)
@click.option("--logprobs", type=int, help="With --json: log-probabilities, and of so many alternatives.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")
@click.option("--system", help="A system message.")
@context_option
@engine_options
@sparsity_options
@sketch_option
@tile_cache_option
@json_option
def generate(
    model: str,
    prompt: tuple[str, ...],
    logprobs: int | None,
    raw: bool,
    system: str | None,
    context: int | None,
    backend: str,
    threads: int | None,
    kv_bits: int | None,
    tau: float | None,
    strict: bool,
    dense: bool,
    plan: str,
    sketch_head: bool | None,
    no_tile_cache: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer a prompt. The answer goes to stdout, token rates go to stderr.

    MODEL is a name in the store or a path; the default is smollm2, fetched once.
    """
    if not prompt:
        raise click.UsageError("Give a prompt with -p TEXT, or -p - to read it from stdin.")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs is printed with --json only; add it.")
    if logprobs is not None and sketch_head:
        raise click.UsageError("--logprobs needs all logits, of which --sketch-head computes few; drop one of them.")
    texts = _read(prompt)
    from ondevice.generation.sampling import SamplingParams
    from ondevice.model import load

    fields = {**sampling(options), "logprobs": logprobs}
    SamplingParams(**fields)  # a bad value must not wait for the model to load
    with reporting() as progress:
        loaded = load(
            model,
            backend=backend,
            threads=threads,
            tau=tau,
            strict=strict,
            dense=dense,
            plan=plan,
            sketch_head=sketch_head,
            tile_cache=not no_tile_cache,
            kv_bits=kv_bits,
            progress=progress,
        )
    say_where(loaded)
    settings = {"raw": raw, "system": system, "context": context, **fields}
    if as_json or len(texts) > 1:
        answers = cast("list[Answer]", loaded.generate(texts, **settings))
        _print_json(loaded, answers) if as_json else _print_batch(texts, answers)
    else:
        stream(loaded, texts[0], settings)


def say_where(model: Model) -> None:
    """Says on stderr which device runs the model, where the backend's name leaves that open."""
    if model.decoder.ops.where is not None:
        click.echo(f"{model.decoder.ops.name} on the {model.decoder.ops.where}", err=True)


def _read(prompts: tuple[str, ...]) -> list[str]:
    """The prompts, with stdin in the place of "-"."""
    if prompts.count("-") > 1:
        raise click.UsageError("-p - can be given once: there is one stdin.")
    return [read_stdin() if text == "-" else text for text in prompts]


def stream(model: Model, prompt: str, settings: dict[str, Any]) -> None:
    """Prints an answer as it comes.

    Args:
        settings: of `Model.stream`.
    """
    end = "\n"
    for piece in model.stream(prompt, **settings):
        write(piece.text)
        if piece.text:
            end = "" if piece.text.endswith("\n") else "\n"
        if piece.stats is not None:
            write(end)
            click.echo(rates(piece.stats, piece.finish_reason or ""), err=True)


def _print_batch(prompts: list[str], answers: list[Answer]) -> None:
    for i, (prompt, answer) in enumerate(zip(prompts, answers), 1):
        first_line = prompt.strip().split("\n", 1)[0]
        write(f"[{i}] {first_line[:70]}\n{answer.text.rstrip()}\n\n")
        click.echo(f"[{i}] {rates(answer.stats, answer.finish_reason)}", err=True)


def rates(stats: Stats, reason: str) -> str:
    """One line with counts and rates of an answer."""
    new = stats.prompt_tokens - stats.reused_tokens
    reused = f" (+{stats.reused_tokens} reused)" if stats.reused_tokens else ""
    rate = f", {stats.generation_tps:.1f} tok/s" if stats.generation_tps else ""
    prompt = f"prompt {new} tokens{reused}, {stats.prompt_tps:.0f} tok/s"
    return f"{prompt}; answer {stats.generated_tokens} tokens{rate}{_kept(stats)}; ended by {reason}"


def _kept(stats: Stats) -> str:
    """What a model that skips work has kept; "" for a dense one."""
    sketched = "" if stats.sketched_tokens is None else f"; {stats.sketched_tokens} by a sketched head"
    if stats.sparsity is None:
        return sketched
    parts = [f"{100 * kept:.0f} % of {what}" for what, kept in stats.sparsity.density.items()]
    return f"{sketched}; {stats.sparsity.method} ran {', '.join(parts) or 'everything'}"


def _print_json(model: Model, answers: list[Answer]) -> None:
    click.echo(json.dumps([_as_json(model, answer) for answer in answers], indent=1))


def _as_json(model: Model, answer: Answer) -> dict[str, Any]:
    document: dict[str, Any] = {
        "text": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        "stop": answer.stop,
        "prompt_tps": round(answer.stats.prompt_tps, 2),
        "generation_tps": round(answer.stats.generation_tps, 2),
        "stats": asdict(answer.stats),
    }
    if answer.logprobs is not None:
        piece = model.tokenizer.token_bytes
        document["logprobs"] = [
            {
                "token": entry.token,
                "text": piece(entry.token).decode(errors="replace"),
                "logprob": entry.logprob,
                "top": [
                    {"token": token, "text": piece(token).decode(errors="replace"), "logprob": logprob}
                    for token, logprob in entry.top
                ],
            }
            for entry in answer.logprobs
        ]
    return document

"""`ondevice bench`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ondevice.commands.options import backend_option, kv_bits_option, plan_option
from ondevice.commands.progress import reporting
from ondevice.defaults import DEFAULT_MODEL
from ondevice_bench.chips import CHIPS, HERE

if TYPE_CHECKING:
    from ondevice_bench.cases import Case
    from ondevice_bench.loading import Source
    from ondevice_bench.report import Row

DEFAULT_BITS, DEFAULT_GROUP = 4, 32
LEFT_OUT = {"-p": "--only tg", "-n": "--only pp"}
"""How to leave a kind of test out, by the option whose 0 says so in llama-bench."""


class Numbers(click.ParamType[tuple[int, ...]]):
    """Integers with commas between.

    Args:
        low: least value.
    """

    name = "N,..."

    def __init__(self, low: int) -> None:
        self.low = low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers of one occurrence of the option."""
        if not isinstance(value, str):
            return tuple(value)
        return tuple(self._number(part, param, ctx) for part in value.split(","))

    def _number(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        flag = param.opts[0] if param else ""
        try:
            number = int(text)
        except ValueError:
            self.fail(f"{text!r} is no whole number; write one, or several with commas between.", param, ctx)
        if number < self.low:
            way = f"; {LEFT_OUT[flag]} leaves these tests out" if flag in LEFT_OUT else ""
            self.fail(f"{number} is not possible; give {self.low} or more{way}.", param, ctx)
        return number


def _numbers(*names: str, default: int | None, low: int, help: str, **extra: Any) -> Any:
    shown = "" if default is None else f"  [default: {default}]"
    values = None if default is None else [(default,)]
    return click.option(*names, type=Numbers(low), multiple=True, default=values, help=help + shown, **extra)


@click.command("bench")
@click.argument("model", default=DEFAULT_MODEL, envvar="ONDEVICE_MODEL")
@click.option("--shape", metavar="NAME", help="Instead of MODEL: random weights of a known model's shape; see below.")
@click.option("--bits", type=click.Choice(["4", "5", "6", "8", "16"]), help="Of --shape's weights.  [default: 4]")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="Inputs with one scale.  [default: 32]")
@_numbers("-p", "--prompt", default=512, low=1, help="Tokens of a prompt (pp).")
@_numbers("-n", "--generate", default=128, low=1, help="Tokens generated (tg).")
@_numbers("-d", "--depth", default=0, low=0, help="Tokens in the context before.")
@_numbers("-b", "--batch", default=1, low=1, help="Sequences: tg decodes them together, pp reads one after another.")
@click.option("--only", type=click.Choice(["pp", "tg"]), help="Leave the other tests out.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Timed per test.")
@click.option(
    "--sparsity",
    metavar="METHOD[:KEY=VALUE,...]",
    multiple=True,
    help="Run --shape also with a method that skips work, in turn with the dense one; repeat for several; see below.",
)
@plan_option
@click.option(
    "--sketch-head/--no-sketch-head",
    default=None,
    help="Run with a sketch of the head and without, in turn, or without.  [default: as the model says]",
)
@_numbers(
    *("-t", "--threads"),
    default=None,
    low=1,
    envvar="ONDEVICE_THREADS",
    help="Threads of the CPU backend.  [default: one per usable core]",
)
@backend_option
@kv_bits_option
@click.option(
    *("--sweep", "picture"),
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.svg",
    help="Run each --sparsity at 10, 20 ... 100 % of rows, and write speed-up over density there; see below.",
)
@click.option(
    *("--predict", "chip"),
    type=click.Choice([*CHIPS, HERE]),
    metavar="CHIP",
    help="Run nothing: say what the memory of one of Apple's chips (m1, m2-pro, m4-max ...) allows; see below.",
)
@click.option("--profile", is_flag=True, help="Say where the time of a decode step goes, part by part.")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json"]), help="Format.  [default: md]")
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
@click.pass_context
def bench(
    ctx: click.Context,
    model: str,
    shape: str | None,
    bits: str | None,
    group_size: str | None,
    prompt: tuple[tuple[int, ...], ...],
    generate: tuple[tuple[int, ...], ...],
    depth: tuple[tuple[int, ...], ...],
    batch: tuple[tuple[int, ...], ...],
    only: str | None,
    repetitions: int,
    sparsity: tuple[str, ...],
    plan: str,
    sketch_head: bool | None,
    threads: tuple[tuple[int, ...], ...],
    backend: str,
    kv_bits: int | None,
    picture: Path | None,
    chip: str | None,
    profile: bool,
    output: str | None,
    as_json: bool,
) -> None:
    """Measure tokens per second, and bytes moved for them.

    Tests are named as by llama-bench: pp512 reads a prompt of 512 tokens, tg128 generates 128, "@ d4096" does so after
    4096 tokens, which are not timed, b32 for 32 sequences (of --shape, all with the same context, each in memory of its
    own); tok/s counts the tokens of all sequences. Options that take N,... take lists or can be repeated; all
    combinations run. Each test runs once to warm up. Tokens are random; tokenizing and sampling are not measured.

    bytes/token is what must move through memory. Counted are the packed weights that a step reads, once for all tokens
    of the step (of the embedding one row per token, the head whole, a table that is both once), and the keys and values
    that are visible; activations and writes are not. A prompt passes in steps of 512 tokens. GB/s is that times tok/s,
    and can exceed what the memory gives where the cache holds part of it.

    --profile runs each tg test once more. Times are means over threads: of work in each part of the model, of waiting
    for other threads, and other, which is Python between the steps and threads that the system had not started yet.

    --sparsity takes: lists (random lists, no selector), lte, d2dmoe, polar, spark, with keys rows (part of the FFN's
    neurons that run; polar also knows rows=published), block (neurons of a group), heads (part of the heads), tokens
    (keys that spark attends to), rank and width (of routers), as in lte:rows=0.5,block=32. The method's selector runs
    and is measured, then a fresh random list of the wanted length replaces its result for every token and layer.
    Spark's counterpart is the dense shape with as many weights. With --sketch-head all methods have the sketch too, and
    their speed-up is over the dense shape that has it.

    --plan says which layers skip; auto goes by the forced density. --sweep runs each method and the dense shape in
    turn, at least 20 times at each density (-r), in a single tg test; a table or JSON has medians of the speed-up with
    95 % intervals, and the picture also what bytes alone would give.

    --predict divides a memory's published bandwidth by the bytes that a token moves in the mlx backend's layout: what
    generation can reach at most, marked as a prediction in table and JSON. `--predict here` does so for this machine's
    CPU, at the bandwidth that is measured, to see how far such predictions hold. Of models that skip, at the density
    that they are expected to keep, by rows, and of one sequence.

    Shapes: smollm2-135m, qwen2.5-0.5b, qwen3-0.6b, gemma-2-2b, gemma-3-1b, llama-3.2-1b, llama-3.1-8b, llama-2-7b,
    opt-125m, opt-1.3b, opt-6.7b. Their weights are random codes without biases, as in GGUF's Q4_0 and Q8_0, head and
    embedding included.
    """
    if output not in (None, "json") and as_json:
        raise click.UsageError(f"--json and -o {output} contradict each other; give one.")
    if profile and only == "pp":
        raise click.UsageError("--profile looks at generation, which --only pp leaves out; drop one of them.")
    sources = _sources(_source(ctx, model, shape, bits, group_size, kv_bits), sparsity, sketch_head, plan)
    from ondevice_bench.cases import grid

    prompts, generated = (() if only == "tg" else _flat(prompt)), (() if only == "pp" else _flat(generate))
    cases = grid(prompts, generated, _flat(depth), _flat(batch))
    if chip is not None:
        for flag, given in (("--sweep", picture), ("--profile", profile), ("--sketch-head", sketch_head)):
            if given:
                raise click.UsageError(f"{flag} measures, and --predict runs nothing: drop one of them.")
        if backend not in ("auto", "cpu" if chip == HERE else "mlx"):
            raise click.UsageError(f"--predict {chip} is not of backend {backend}; leave --backend out.")
        if output == "csv":
            raise click.UsageError("predictions have no CSV; take -o md or json.")
        _predict(sources, chip, cases, kv_bits, as_json or output == "json")
        return
    if picture is not None:
        if output == "csv":
            raise click.UsageError("a sweep has no CSV; take -o md or json.")
        given = ctx.get_parameter_source("repetitions") is ParameterSource.COMMANDLINE
        counts = _flat(threads) or (None,)
        _sweep(picture, sources, backend, counts, cases, repetitions if given else None, as_json or output == "json")
        return
    from ondevice_bench.report import render

    rows: list[Row] = []
    for count in _flat(threads) or (None,):
        rows += run_tests(sources, backend, count, cases, repetitions, profile)
    click.echo(render(rows, "json" if as_json else output or "md"))


def _predict(sources: list[Source], chip: str, cases: list[Case], kv_bits: int | None, as_json: bool) -> None:
    """Prints what a chip's memory allows."""
    from ondevice_bench.cases import check
    from ondevice_bench.loading import open_source
    from ondevice_bench.predict import predict, render

    rows = []
    for source in sources:
        with open_source(source, cases) as checkpoint:
            check([case for case in cases if case.kind == "tg"], checkpoint.spec, source.name)
            rows += predict(checkpoint, source.label, chip, cases, kv_bits)
    click.echo(render(rows, "json" if as_json else "md"))


def _sources(dense: Source, sparsity: tuple[str, ...], sketch_head: bool | None, plan: str) -> list[Source]:
    """The dense model, and what else runs in turn with it: with a sketch of the head too, if there is any."""
    heads = (False, True) if sketch_head else (sketch_head,)
    sources = [dataclasses.replace(dense, sketch_head=head) for head in heads]
    if not sparsity:
        return sources
    if dense.bits is None:
        raise click.UsageError(f"--sparsity {sparsity[0]} makes random routers, for the weights of --shape; add it.")
    from ondevice_bench.sparsity import parse

    return [*sources, *(dataclasses.replace(sources[-1], sparsity=parse(text), plan=plan) for text in sparsity)]


def _sweep(
    picture: Path,
    sources: list[Source],
    backend: str,
    threads: tuple[int | None, ...],
    cases: list[Case],
    repetitions: int | None,
    as_json: bool,
) -> None:
    """Runs a sweep, prints it and writes its picture."""
    from ondevice_bench.curves import svg
    from ondevice_bench.sweep import LEAST_ROUNDS, sweep, table

    rounds = repetitions or LEAST_ROUNDS
    if rounds < LEAST_ROUNDS:
        raise click.UsageError(f"-r {rounds}: a sweep needs {LEAST_ROUNDS} turns or more for its intervals.")
    if len(cases) != 1 or cases[0].kind != "tg" or len(threads) != 1:
        raise click.UsageError("--sweep takes one test: --only tg, and one number each for -n, -d, -b and -t.")
    dense, *others = (source for source in sources if source.sketch_head == sources[-1].sketch_head)
    if not others or others[-1].sparsity is None:
        raise click.UsageError("--sweep needs a method that skips: add --sparsity and --shape.")
    with reporting() as progress:
        points = list(sweep([dense, *others], backend, threads[0], cases[0], rounds, progress))
    title = f"{dense.label}, {cases[0].name}, {rounds} turns"
    picture.write_text(svg(points, title))
    click.echo(json.dumps([dataclasses.asdict(p) for p in points], indent=1) if as_json else table(points))


def _flat(values: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(number for some in values for number in some)


def _source(
    ctx: click.Context, model: str, shape: str | None, bits: str | None, group_size: str | None, kv_bits: int | None
) -> Source:
    from ondevice_bench.loading import Source

    if shape is None:
        for flag, value in (("--bits", bits), ("--group-size", group_size)):
            if value is not None:
                raise click.UsageError(f"{flag} {value} is of random weights, which --shape asks for; add it.")
        return Source(model, kv_bits=kv_bits)
    if ctx.get_parameter_source("model") is ParameterSource.COMMANDLINE:
        raise click.UsageError(f"MODEL {model!r} and --shape {shape!r} contradict each other; give one.")
    if bits == "16" and group_size is not None:
        raise click.UsageError(f"--group-size {group_size}: weights of 16 bits have no groups; drop it.")
    return Source(shape, int(bits or DEFAULT_BITS), int(group_size or DEFAULT_GROUP), kv_bits=kv_bits)


def run_tests(
    sources: list[Source], backend: str, threads: int | None, cases: list[Case], repetitions: int, profile: bool
) -> Iterator[Row]:
    """Rows of all tests with one number of threads; several sources run in turn, the first of them dense."""
    from ondevice import machine
    from ondevice_bench.loading import load_decoder
    from ondevice_bench.measure import in_turn
    from ondevice_bench.report import Setting, row
    from ondevice_bench.traffic import bits_per_weight, model_bytes

    with reporting() as progress:
        decoders = [load_decoder(source, backend, threads, cases, profile, progress) for source in sources]
    used = getattr(decoders[0].ops, "threads", None)
    gbs = machine.read_bandwidth(used or machine.default_threads()) / 1e9
    settings = [
        Setting(
            *(source.label, model_bytes(decoder), bits_per_weight(decoder), decoder.ops.name, used, gbs),
            sparsity=source.skipping(decoder),
            device=decoder.ops.where,
            kv_bits=source.kv_bits,
        )
        for source, decoder in zip(sources, decoders)
    ]
    for i, case in enumerate(cases, 1):
        # One line before each test: a bar that moves would take time from what is measured.
        click.echo(f"measuring {case.name} ({i} of {len(cases)}) ...", err=True)
        results = in_turn(decoders, case, repetitions, profile, alike=sources[0].bits is not None)
        for source, setting, result in zip(sources, settings, results):
            # What skips in its layers is compared with what has the same head.
            other = results[1] if source.sketch_head and source.sparsity else results[0]
            yield row(setting, result, None if result is results[0] else other)

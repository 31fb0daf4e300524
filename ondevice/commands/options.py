"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ondevice.defaults import BACKENDS, DEFAULT_MODEL

F = TypeVar("F", bound=Callable[..., Any])

CHAT_TEMP = "  [default: 0.2; 0 for a single prompt, so that one question has one answer]"


class WholeText(click.ParamType[str]):
    """A text that an environment variable gives as one value, though the option can be repeated."""

    name = "text"

    def split_envvar_value(self, rv: str) -> list[str]:
        """The variable is one value; click would cut it at spaces."""
        return [rv]


TEXT = WholeText()


def model_argument(f: F) -> F:
    """MODEL, with the default model and the twin ONDEVICE_MODEL."""
    return click.argument("model", default=DEFAULT_MODEL, envvar="ONDEVICE_MODEL")(f)


def backend_option(f: F) -> F:
    """--backend, with the twin ONDEVICE_BACKEND for all commands."""
    return click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default="auto",
        show_default=True,
        envvar="ONDEVICE_BACKEND",
        help="What computes; mlx is for Apple silicon, reference is float64 and slow.",
    )(f)


def engine_options(f: F) -> F:
    """--backend, --threads and --kv-bits, with the twins ONDEVICE_BACKEND and so on for all commands."""
    threads = click.option(
        "-t",
        "--threads",
        type=click.IntRange(1),
        envvar="ONDEVICE_THREADS",
        help="Threads of the CPU backend.  [default: one per usable core]",
    )
    return backend_option(threads(kv_bits_option(f)))


def kv_bits_option(f: F) -> F:
    """--kv-bits, with the twin ONDEVICE_KV_BITS for all commands that run models."""
    return click.option(
        "--kv-bits",
        type=click.IntRange(1),
        envvar="ONDEVICE_KV_BITS",
        help="Keep keys and values in 8 or 4 bits: less memory, less precise. Of the mlx backend.  [default: floats]",
    )(f)


def tile_cache_option(f: F) -> F:
    """--no-tile-cache."""
    help = "Neither read nor keep packed weights in the user's cache folder.  [ONDEVICE_NO_TILE_CACHE=1]"
    return click.option("--no-tile-cache", is_flag=True, help=help)(f)


def sparsity_options(f: F) -> F:
    """--tau, --strict, --dense and --plan, for all commands that run models, with twins ONDEVICE_TAU and so on."""
    tau = click.option(
        "--tau",
        type=float,
        envvar="ONDEVICE_TAU",
        help="d2dmoe models: run experts from this part of the largest prediction on, 0 to 1.  [default: the model's]",
    )
    strict = click.option(
        "--strict",
        is_flag=True,
        envvar="ONDEVICE_STRICT",
        help="Fail where a sparse path cannot run, instead of running dense.",
    )
    dense = click.option("--dense", is_flag=True, envvar="ONDEVICE_DENSE", help="Skip no work.")
    return tau(strict(dense(plan_option(f))))


def plan_option(f: F) -> F:
    """--plan, with the twin ONDEVICE_PLAN."""
    return click.option(
        "--plan",
        metavar="auto|sparse|dense|FILE",
        default="auto",
        show_default=True,
        envvar="ONDEVICE_PLAN",
        help="Which layers skip work: those faster so on this machine, all, none, or as a JSON file says.",
    )(f)


def sketch_option(f: F) -> F:
    """--sketch-head, with the twin ONDEVICE_SKETCH_HEAD for all commands that run models."""
    return click.option(
        "--sketch-head/--no-sketch-head",
        default=None,
        envvar="ONDEVICE_SKETCH_HEAD",
        help="Score words by a sketch, and compute the logits of those that matter; all of them under penalties.  "
        "[default: as the model says]",
    )(f)


def json_option(f: F) -> F:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(f)


def sampling_options(max_tokens: int, temp: float | None = 0.7, top_p: float = 1.0) -> Callable[[F], F]:
    """Options that become SamplingParams, collected by `sampling`.

    Args:
        max_tokens, temp, top_p: defaults; without one for --temp, the command says in CHAT_TEMP what it takes.
    """
    temp_help = "Temperature; 0 takes the most likely token." + (CHAT_TEMP if temp is None else "")
    options = [
        click.option("-n", "--max-tokens", default=max_tokens, show_default=True, help="Most tokens of an answer."),
        click.option("--temp", type=float, default=temp, show_default=True, help=temp_help),
        click.option("--top-k", default=0, show_default=True, help="Keep the k most likely tokens; 0 keeps all."),
        click.option("--top-p", default=top_p, show_default=True, help="Keep tokens until their mass reaches this."),
        click.option("--min-p", default=0.0, show_default=True, help="Keep tokens this likely relative to the best."),
        click.option("--repetition-penalty", default=1.0, show_default=True, help="Divides seen tokens' logits."),
        click.option("--presence-penalty", default=0.0, show_default=True, help="Subtracted from answered tokens."),
        click.option("--frequency-penalty", default=0.0, show_default=True, help="The same for each occurrence."),
        click.option("--seed", type=int, help="Makes the choice repeatable."),
        click.option("--stop", type=TEXT, multiple=True, help="A text that ends the answer; repeat for several."),
    ]

    def add(f: F) -> F:
        for option in reversed(options):
            f = option(f)
        return f

    return add


def sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams from the options of `sampling_options`, which are taken out of `options`."""
    same = ("max_tokens", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    fields = {name: options.pop(name) for name in (*same, "seed", "stop")}
    return {**fields, "temperature": options.pop("temp")}


def context_option(f: F) -> F:
    """--context."""
    help = "Tokens that prompt and answer may take together.  [default: what the model allows]"
    return click.option("-c", "--context", type=click.IntRange(1), help=help)(f)

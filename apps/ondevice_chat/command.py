"""`ondevice chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ondevice.commands.generate import say_where, stream
from ondevice.commands.options import (
    TEXT,
    context_option,
    engine_options,
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
    from ondevice_chat.conversation import Conversation


@click.command()
@model_argument
@click.option("-p", "--prompt", type=TEXT, help="Answer this one prompt and exit; so does a prompt on stdin.")
@sampling_options(max_tokens=1024, temp=None, top_p=0.9)
@click.option("--system", help="A system message.")
@context_option
@engine_options
@sparsity_options
@sketch_option
@tile_cache_option
def chat(
    model: str,
    prompt: str | None,
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
    **options: Any,
) -> None:
    """Talk with a model. /help lists the chat's own commands.

    MODEL is a name in the store or a path; the default is smollm2, fetched once.
    """
    if prompt in (None, "-") and not sys.stdin.isatty():
        prompt = read_stdin()
    elif prompt == "-":
        raise click.UsageError("-p - reads stdin, which is the terminal; leave it out to chat.")
    if prompt is not None and not prompt.strip():
        raise click.UsageError("The prompt is empty; give one with -p or on stdin, or run it in a terminal to chat.")
    from ondevice.generation.sampling import SamplingParams
    from ondevice.model import load
    from ondevice_chat.conversation import Conversation

    fields = sampling(options)
    if fields["temperature"] is None:
        # Small models lose the thread at the usual 0.7.
        fields["temperature"] = 0.2 if prompt is None else 0.0
    params = SamplingParams(**fields)
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
    if prompt is not None:
        say_where(loaded)
        stream(loaded, prompt, {"system": system, "context": context, **fields})
        return
    _talk(Conversation(loaded, params, system, context))


def _talk(conversation: Conversation) -> None:
    from ondevice_chat.loop import chat as talk
    from ondevice_chat.terminal import LineReader

    model = conversation.model
    ops = model.decoder.ops
    threads = f", {ops.threads} threads" if hasattr(ops, "threads") else ""
    where = f" on the {ops.where}" if ops.where else ""
    write(f"{model.name} on {ops.name}{where}{threads}, context {conversation.session.context} tokens\n")
    write(f"{conversation.settings()}\n/help lists the commands; Ctrl+C stops an answer; Ctrl+D leaves\n")
    talk(conversation, LineReader(), write)

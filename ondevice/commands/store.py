"""The commands of the local store: pull, ls, show, rm."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import click

from ondevice.commands.options import json_option, model_argument
from ondevice.commands.progress import reporting, size
from ondevice.commands.terminal import safe, table
from ondevice.defaults import DEFAULT_MODEL


@click.command()
@model_argument
def pull(model: str) -> None:
    """Fetch a model into the local store, unless it is there; prints where it lies.

    MODEL is an alias (smollm2), org/repo, org/repo@revision or org/repo/file.gguf of the Hub.
    """
    from ondevice.checkpoint import store

    with reporting() as progress:
        path = store.pull(model, progress)
    click.echo(str(path))


@click.command()
@json_option
def ls(as_json: bool) -> None:
    """List the models in the store."""
    from ondevice.checkpoint import store, tile_files

    entries = store.ls()
    cached = [tile_files.cached_bytes(entry.path) for entry in entries]
    if as_json:
        told = [{**asdict(entry), "path": str(entry.path), "cached": kept} for entry, kept in zip(entries, cached)]
        click.echo(json.dumps(told, indent=1))
        return
    if not entries:
        click.echo(f"No models in {store.root()}; `ondevice pull {DEFAULT_MODEL}` fetches one.", err=True)
    width = max((len(entry.name) for entry in entries), default=0)
    for entry, kept in zip(entries, cached):
        day = time.strftime("%Y-%m-%d", time.localtime(entry.modified))
        also = f"  {size(kept):>7} cached" if kept else ""
        click.echo(f"{entry.name:<{width}}  {size(entry.size):>7}  {entry.format:<4}  {day}{also}")


@click.command()
@model_argument
@json_option
def show(model: str, as_json: bool) -> None:
    """Say what a model is; only headers are read. MODEL is a name in the store or a path."""
    from ondevice.checkpoint import open_checkpoint, store

    with open_checkpoint(store.resolve(model)) as checkpoint:
        about = checkpoint.describe()
    click.echo(json.dumps(about, indent=1, default=str) if as_json else safe(table(_for_people(about))))


def _for_people(about: dict[str, Any]) -> dict[str, str]:
    types = about.pop("types")
    lines = {
        key: f"{value:,}" if isinstance(value, int) and value > 9999 else str(value) for key, value in about.items()
    }
    lines["bytes"] = size(about["bytes"])
    for kind, numbers in types.items():
        share = f"{numbers['parameters']:,} weights, {numbers['bits_per_weight']:g} bits each"
        lines[kind] = f"{numbers['tensors']} tensors, {share}, {size(numbers['bytes'])}"
    return lines


@click.command()
@click.argument("model", required=False)
@click.option(
    "--cache", is_flag=True, help="Delete the packed weights of all models and what plans were measured from; no model."
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(model: str | None, cache: bool, yes: bool) -> None:
    """Delete a model, and what is kept of it for quick starts, from the store. Files elsewhere are never touched."""
    if (model is None) != cache:
        raise click.UsageError("Give either the name of a model or --cache.")
    from ondevice.checkpoint import store, tile_files

    if model is None:
        from ondevice.sparsity import measurements

        measurements.clear()
        click.echo(f"deleted {size(tile_files.clear())} of packed weights", err=True)
        return
    entry = next((entry for entry in store.ls() if entry.name == model), None)
    if entry is not None and not yes:
        click.confirm(f"Delete {model} ({size(entry.size)})?", abort=True, err=True)
    freed = tile_files.remove(entry.path) if entry is not None else 0
    store.remove(model)
    click.echo(f"deleted {model}" + (f" and {size(freed)} of packed weights" if freed else ""), err=True)

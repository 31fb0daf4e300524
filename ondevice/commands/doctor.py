"""`ondevice doctor`: what this machine offers, and what will be used."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import click

from ondevice import __version__, machine
from ondevice.commands.options import json_option
from ondevice.commands.progress import reporting, size
from ondevice.commands.terminal import table
from ondevice.defaults import DEFAULT_MODEL

LIBRARIES = (
    "numpy",
    "numba",
    "llvmlite",
    "tokenizers",
    "huggingface-hub",
    "jinja2",
    "click",
    "rich",
    "prompt-toolkit",
    "mlx",
    "torch",
    "triton",
)
MEASURED = ("cpu", "mlx")
"""Backends that a report compares with the reference."""
MLX_CPU = "ready on the {}: slow, for tests"
MLX_GPU = "ready on the {}; never yet tried by its authors, who have no Mac"


@click.command()
@click.option("--warm", is_flag=True, help="Compile now what the models in the store need.")
@click.option(
    *("--report", "file"),
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Also compare the backends with the reference and measure them, for minutes, and write all of it as JSON.",
)
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="What --report measures.")
@click.option("--parity", is_flag=True, help="Run every kernel here against float64, which takes minutes.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the inputs of --parity.")
@json_option
def doctor(warm: bool, file: Path | None, model: str, parity: bool, seed: int, as_json: bool) -> None:
    """Say what this machine offers and what will be used; takes a second to measure its memory.

    --report makes one JSON file to send to the authors, who lack machines such as Macs: the machine, versions, how far
    each kernel is from float64 and each backend from the reference, and tokens per second. It holds paths of this
    machine's caches, and no other text of yours.
    """
    if parity and file is not None:
        raise click.UsageError("--parity and --report are two things; give one")
    if parity:
        _parity(seed, as_json)
        return
    if warm:
        _warm()
    report = examine()
    if file is not None:
        _report(file, report, model)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    for title, values in _for_people(report).items():
        click.secho(title, bold=True)
        click.echo(table(values, "  "))


def _report(file: Path, report: dict[str, Any], model: str) -> None:
    # Tools import this package, not the other way round; their commands are named as text.
    health = import_module("ondevice_bench.health").health
    ready = [name for name in MEASURED if report["backends"][name].startswith("ready")]
    found = {**report, **health(ready, model, lambda text: click.echo(f"{text} ...", err=True))}
    file.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    failed = sum("error" in row for part in ("agreement", "bench") for row in found[part])
    failed += not found["parity"].get("passed", False)
    click.echo(f"wrote {file}" + (f"; {failed} parts failed, as told there" if failed else ""), err=True)


def _parity(seed: int, as_json: bool) -> None:
    """Prints the table, or JSON; exits with 1 where a kernel is wrong."""
    from ondevice_parity import parity

    with reporting() as progress:
        report = parity.run(seed=seed, progress=progress)
    click.echo(json.dumps(report.document(), indent=1) if as_json else "\n".join(parity.lines(report)))
    if not report.passed:
        sys.exit(1)


def _warm() -> None:
    from ondevice.checkpoint import store
    from ondevice.model import load

    entries = store.ls()
    if not entries:
        click.echo(f"nothing to compile for: no model in the store; `ondevice pull {DEFAULT_MODEL}`", err=True)
    for entry in entries:
        with reporting() as progress:
            load(entry.path, backend="cpu", progress=progress)
        click.echo(f"kernels for {entry.name} are compiled", err=True)


def examine() -> dict[str, Any]:
    """Everything that `doctor` reports, for people and for JSON output."""
    return {
        "machine": _machine(),
        "kernels": _kernels(),
        "backends": _backends(),
        "store": _store(),
        "tile_cache": _tile_cache(),
        "measurements": _measurements(),
        "versions": _versions(),
    }


def _machine() -> dict[str, Any]:
    total, available = machine.memory_bytes()
    threads = machine.default_threads()
    one = machine.read_bandwidth(1)
    return {
        "cpu": machine.cpu_name(),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "logical_cpus": os.cpu_count(),
        "threads": threads,
        "threads_reason": machine.threads_reason(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "read_gbs_one_thread": round(one / 1e9, 1),
        "read_gbs_all_threads": round((machine.read_bandwidth(threads) if threads > 1 else one) / 1e9, 1),
    }


def _kernels() -> dict[str, Any]:
    from cpu_kernels import amx
    from cpu_kernels.code_cache import ENDING, cache_folder
    from cpu_kernels.integer_dots import instruction_set

    folder, obstacle = cache_folder(), amx.obstacle()
    return {
        "instruction_set": instruction_set(),
        "amx": f"no: {obstacle}" if obstacle else "yes",
        "cache_folder": str(folder),
        "compiled": sum(1 for _ in folder.glob(f"*{ENDING}")),
    }


def _backends() -> dict[str, str]:
    return {
        "auto": "takes cpu",
        "cpu": "ready",
        "reference": "ready (float64, slow: the judge of the others)",
        "mlx": _mlx(),
        "cuda": _cuda(),
        "torch": _torch(),
    }


def _mlx() -> str:
    from ondevice.ops import mlx_device

    problem = mlx_device.obstacle()
    if problem is not None:
        return f"no: {problem}"
    device = mlx_device.find_device()
    return (MLX_GPU if device.gpu else MLX_CPU).format(device.name)


def _cuda() -> str:
    from ondevice.ops import torch_device

    problems = torch_device.cuda_obstacles()
    if problems:
        return f"no: {'; '.join(problems)}"
    if torch_device.interpreting():
        return "ready on the CPU (Triton's interpreter: very slow, a test)"
    return f"ready on the {torch_device.find_cuda().name}"


def _torch() -> str:
    from ondevice.ops import torch_device

    problem = torch_device.torch_obstacle()
    return f"no: {problem}" if problem else "ready (plain torch, for comparisons and training)"


def _store() -> dict[str, Any]:
    from ondevice.checkpoint import store

    entries = store.ls()
    return {"folder": str(store.root()), "models": len(entries), "bytes": sum(entry.size for entry in entries)}


def _tile_cache() -> dict[str, Any]:
    from ondevice.checkpoint import tile_files

    files, nbytes = tile_files.all_bytes()
    return {"folder": str(tile_files.folder()), "files": files, "bytes": nbytes, "off": tile_files.switched_off()}


def _measurements() -> dict[str, Any]:
    from ondevice.sparsity import measurements

    return {"folder": str(measurements.folder()), "files": measurements.count()}


def _versions() -> dict[str, str]:
    found = {"ondevice": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _for_people(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    m, kernels, store, tiles = (report[key] for key in ("machine", "kernels", "store", "tile_cache"))
    free = m["memory_available_bytes"]
    bandwidth = (
        f"{m['read_gbs_one_thread']} GB/s read by one thread, {m['read_gbs_all_threads']} GB/s by {m['threads']}"
    )
    compiled = f"{kernels['compiled']} in {kernels['cache_folder']}"
    return {
        "Machine": {
            "CPU": f"{m['cpu']} ({m['architecture']})",
            "system": m["system"],
            "threads": f"{m['threads']} ({m['threads_reason']})",
            "memory": size(m["memory_bytes"]) + (f", {size(free)} available" if free is not None else ""),
            "bandwidth": bandwidth,
        },
        "Kernels": {
            "instruction set": kernels["instruction_set"],
            "amx": kernels["amx"],
            "compiled": compiled if kernels["compiled"] else f"none yet: the first model takes longer ({compiled})",
        },
        "Backends": report["backends"],
        "Store": {"folder": store["folder"], "models": f"{store['models']}, {size(store['bytes'])}"},
        "Packed weights": {
            "folder": tiles["folder"] + (" (switched off)" if tiles["off"] else ""),
            "files": f"{tiles['files']}, {size(tiles['bytes'])}",
        },
        "Measured for plans": report["measurements"],
        "Versions": report["versions"],
    }

"""What there is to know of the Triton kernels on a GPU, in one command of less than 8 minutes.

    python -m ondevice_bench.gpu -o gpu.json --picture gpu.svg

First parity: every kernel against float64, with fresh random inputs and poisoned memory. Then one layer of OPT-66B's
shape, 64 sequences of 1920: attention and FFN at densities of 0.1 to 1.0 beside dense torch, and beside the floor, the
bytes that must move over the measured bandwidth of a copy. Then decoding end to end at OPT-6.7B's shape. Each stage
runs in processes of its own, with a time limit; the JSON file is written after every figure's stage, whatever becomes
of the next. It needs torch, triton, numpy, ml_dtypes and click, no model, and nothing from the net.

`--smoke` runs all of it at toy sizes, in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

Record = dict[str, Any]
LIMIT = 465.0
"""Seconds of the whole."""
STAGES = {"parity": 170.0, "models": 90.0, "layers": 150.0, "decode": 170.0}
"""Seconds of each, at most."""
WORKERS = 8
"""Processes that share the parity cases: nearly all of its time is compiling, on one core each."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
FILE = click.Path(dir_okay=False, path_type=Path)


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _copied(smoke: bool) -> int:
    """Bytes of the copy that measures the memory's bandwidth."""
    return 1 << (20 if smoke else 31)


def _parity(part: int, parts: int, seed: int, smoke: bool) -> Iterator[Record]:
    from ondevice_bench.gpu_parity import CASES, parity

    order = [(kernel, name) for kernel, cases in CASES.items() for name in (list(cases)[2:4] if smoke else cases)]
    mine = set(order[part::parts])
    for result in parity(_device(), seed, lambda kernel, name: (kernel, name) in mine):
        yield result.document()


def _models(smoke: bool) -> Iterator[Record]:
    from ondevice.ops import torch_device

    if _device().type == "cpu":
        os.environ[torch_device.INTERPRET] = "1"
    from ondevice_bench.gpu_models import models

    for result in models(few=smoke):
        yield result.document()


def _layers(smoke: bool) -> Iterator[Record]:
    from ondevice_bench.gpu_layers import layers
    from ondevice_bench.gpu_shapes import LLAMA_7B, OPT_66B, TOY_LAYER, TOY_TOKEN
    from ondevice_bench.gpu_time import copy_bandwidth

    bandwidth = copy_bandwidth(_device(), _copied(smoke))
    yield {"what": "copy", "bytes_per_s": bandwidth}
    shapes = (TOY_LAYER, TOY_TOKEN) if smoke else (OPT_66B, LLAMA_7B)
    yield from layers(shapes, bandwidth, _device(), smoke)


def _decode(smoke: bool) -> Iterator[Record]:
    from ondevice_bench.gpu_decode import decode
    from ondevice_bench.gpu_shapes import OPT_6_7B, TOY_MODEL
    from ondevice_bench.gpu_time import copy_bandwidth

    bandwidth = copy_bandwidth(_device(), _copied(smoke))
    shape, batches = (TOY_MODEL, BATCHES[:2]) if smoke else (OPT_6_7B, BATCHES)
    yield from decode(shape, batches, bandwidth, _device(), smoke)


def run_stage(stage: str, part: int, parts: int, seed: int, smoke: bool, into: Path) -> None:
    """One stage in this process, its records written a line each as they come."""
    with into.open("a") as file:
        match stage:
            case "parity":
                records = _parity(part, parts, seed, smoke)
            case "models":
                records = _models(smoke)
            case "layers":
                records = _layers(smoke)
            case _:
                records = _decode(smoke)
        for record in records:
            print(json.dumps(_finite(record)), file=file, flush=True)
            click.echo(f"{stage}: {record}", err=True)


def _finite(record: Record) -> Record:
    """None in the place of what JSON has no number for: errors that are infinite, or were not taken."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


@dataclass(slots=True)
class Run:
    """A whole run: its settings, and where what it finds is written."""

    output: Path
    seed: int
    smoke: bool
    until: float

    def stage(self, name: str, parts: int = 1) -> tuple[list[Record], str]:
        """Records of a stage, from processes of its own, and why it did not end well ('' where it did)."""
        limit = min(STAGES[name], self.until - time.monotonic())
        if limit <= 5:
            return [], "not run: no time was left"
        environment = dict(os.environ)
        if name in ("parity", "models"):
            # Tiles are timed where speed is measured; here that would compile three for one.
            environment["ONDEVICE_TRITON_TUNING"] = "first"
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{part}.jsonl" for part in range(parts)]
            logs = [Path(folder) / f"{part}.log" for part in range(parts)]
            workers = []
            for part, (into, log) in enumerate(zip(files, logs)):
                command = [sys.executable, "-m", "ondevice_bench.gpu", "--stage", name, "--part", str(part)]
                command += ["--parts", str(parts), "--seed", str(self.seed), "-o", str(into)]
                command += ["--smoke"] if self.smoke else []
                with log.open("w") as out:
                    workers.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
            wrong = self._wait(name, workers, logs, limit)
            lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
        # A process that was stopped may have left half a line.
        return [json.loads(line) for line in lines if line.endswith("}")], wrong

    def _wait(self, name: str, workers: list[subprocess.Popen[bytes]], logs: list[Path], limit: float) -> str:
        """Waits for processes, stops those that outlast the limit, and says what went wrong."""
        end, wrong = time.monotonic() + limit, []
        for worker, log in zip(workers, logs):
            try:
                code = worker.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
                wrong.append(f"stopped after {limit:.0f} s")
            else:
                if code:
                    wrong.append(f"exit code {code}: {log.read_text()[-1500:]}")
        return "; ".join(dict.fromkeys(wrong))


def _machine() -> Record:
    code = (
        "import torch, triton, json; g = torch.cuda.is_available(); print(json.dumps({'torch': torch.__version__, "
        "'triton': triton.__version__, 'device': torch.cuda.get_device_name() if g else 'cpu, interpreted'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"torch and triton must be installed: {done.stderr.strip()[-300:]}")
    machine: Record = json.loads(done.stdout)
    return machine


@click.command(help=(__doc__ or "").replace("\n\n    ", "\n\n\b\n    "))
@click.option("-o", "--output", type=FILE, required=True, help="Write all figures there, as JSON.")
@click.option("--picture", type=FILE, help="Write speed over density there, as SVG.")
@click.option("--smoke", is_flag=True, help="Toy sizes: whether it runs, not how fast.")
@click.option("--seed", type=int, help="Of the parity inputs.  [default: the clock]")
@click.option("--limit", type=click.FloatRange(10), default=LIMIT, show_default=True, help="Seconds of the whole.")
@click.option("--stage", type=click.Choice(list(STAGES)), hidden=True)
@click.option("--part", type=int, default=0, hidden=True)
@click.option("--parts", type=int, default=1, hidden=True)
def main(
    output: Path, picture: Path | None, smoke: bool, seed: int | None, limit: float, stage: str | None, part: int,
    parts: int,
) -> None:  # fmt: skip
    seed = int(time.time()) if seed is None else seed
    if stage:
        run_stage(stage, part, parts, seed, smoke, output)
        return
    from ondevice_bench.gpu_picture import svg
    from ondevice_bench.gpu_report import table

    start = time.monotonic()
    machine = _machine()
    if machine["device"].startswith("cpu"):
        if not smoke:
            raise click.ClickException("there is no NVIDIA GPU that torch can use; --smoke runs toy sizes without one")
        os.environ["TRITON_INTERPRET"] = "1"
    results: Record = {"machine": machine, "seed": seed, "smoke": smoke, "wrong": {}, "seconds": {}}
    run = Run(output, seed, smoke, start + limit)
    for name in STAGES:
        before = time.monotonic()
        workers = max(1, min(WORKERS, (os.cpu_count() or 2) // 2)) if name == "parity" else 1
        results[name], wrong = run.stage(name, workers)
        results["seconds"][name] = round(time.monotonic() - before, 1)
        if wrong:
            results["wrong"][name] = wrong
        output.write_text(json.dumps(results, indent=1))
        if picture is not None and name not in ("parity", "models"):
            picture.write_text(svg(results))
        click.echo(f"{name}: {len(results[name])} records in {results['seconds'][name]} s", err=True)
    click.echo(table(results))
    failed = [record for record in results["parity"] + results["models"] if not record["passed"]]
    if failed or results["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()

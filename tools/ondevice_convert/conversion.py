"""A conversion from beginning to end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from ondevice import __version__
from ondevice.checkpoint import open_checkpoint, store
from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.progress import folder_size
from ondevice.checkpoint.writer import write_checkpoint
from ondevice.commands.method_option import MethodOption
from ondevice.errors import OndeviceError
from ondevice.spec import ModelSpec
from ondevice.spec_hub import as_on_hub, config_from_spec
from ondevice_convert.card import copy_licences, model_card
from ondevice_convert.changed import Changed
from ondevice_convert.fitted import Fitted
from ondevice_convert.methods import check
from ondevice_convert.recipe import group_for, make_recipe
from ondevice_convert.requantized import Requantized
from ondevice_convert.search import Search, told_name
from ondevice_convert.texts import read_text
from ondevice_convert.work import Work

SAMPLE_BYTES = 1 << 28
"""About what samples take while a conversion runs; deep and wide models take up to 2 GiB."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked for.

    Args:
        source: the model, as `ondevice.load` takes it; what is not in the store is fetched.
        target: folder to make.
        bits: of weights; None keeps them.
        group_size: inputs with one scale; None keeps them, or takes 64.
        sparsity: the method; None for a dense model.
        budget: rise of perplexity that "auto" may cost, as a part of it.
        text: to calibrate and to measure quality on; None lets the model write one.
        tokens: to calibrate on, at most.
        seed: of everything random.
        threads: of the CPU backend.
    """

    source: str
    target: Path
    bits: float | None
    group_size: int | None
    sparsity: MethodOption | None
    budget: float
    text: Path | None
    tokens: int
    seed: int
    threads: int | None


def convert(job: Job, progress: Progress) -> Path:
    """Makes the folder; what an earlier, killed call has found is used.

    Args:
        job: what is asked for.
        progress: called with (done, of how many, what); 0 of 0 where nobody knows how many.

    Returns:
        The folder.

    Raises:
        OndeviceError: the target exists, the source cannot be converted so, the text is no use, or the disk is full.
        OptionError: options that the model cannot have.
    """
    if job.target.exists():
        raise OndeviceError(f"{job.target}: exists already; remove it or choose another name")
    text = None if job.text is None else read_text(job.text)
    path = store.pull(job.source, progress, partial(_check, job))
    with open_checkpoint(path) as source:
        _check(job, source.spec)
        config_from_spec(as_on_hub(source.spec))  # refuses what no folder can say
        group_size = None if job.bits is None else group_for(source, job.bits, job.group_size)
        _check_space(source, job)
        work = Work(job.target, _digest(job, source, text))
        try:
            base = _decide(job, source, group_size, work, text, progress)
            outcome = work.outcome(source.spec)
            assert outcome is not None
            _write(job, source, base, work, *outcome, progress)
        except BaseException:
            work.give_up()
            raise
        work.close()
    return job.target


def _decide(
    job: Job,
    source: Checkpoint,
    group_size: int | None,
    work: Work,
    text: tuple[str, str] | None,
    progress: Progress,
) -> Checkpoint:
    """Finds the outcome, unless it was found before. Returns the dense model as it is rounded; nothing stays packed."""
    search = Search(job, source, group_size, work, text, progress)
    if work.outcome(source.spec) is None:
        work.keep_outcome(*search.run())
    return search.base


def _check(job: Job, spec: ModelSpec) -> None:
    """Refuses what cannot be made of a model, by its settings alone."""
    method = spec.sparsity
    if method is not None:
        raise OndeviceError(
            f"{job.source}: skips work already, by {method.name}; convert the dense model that it was made of"
        )
    if job.sparsity is not None:
        check(job.sparsity, spec)


def _check_space(source: Checkpoint, job: Job) -> None:
    folder = next(parent for parent in job.target.absolute().parents if parent.exists())
    weights = sum(prod(shape) for shape in source.spec.tensors().values())
    if job.bits is None:
        needed = Requantized(source, make_recipe(source, None).forms).nbytes
    else:
        needed = min(source.nbytes, int(weights * (job.bits + 1) / 8))
    # Samples, and routers of a few percent.
    needed += needed // 20 + SAMPLE_BYTES if job.sparsity else 0
    hidden = [job.target.with_name(f".{job.target.name}.{kind}") for kind in ("work", "partial")]
    free = shutil.disk_usage(folder).free + sum(folder_size(path) for path in hidden)
    if needed > free:
        raise OndeviceError(
            f"{job.target}: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; free some space or "
            "choose another place"
        )


def _digest(job: Job, source: Checkpoint, text: tuple[str, str] | None) -> str:
    """Of all that decides what comes out."""
    asked = [job.bits, job.group_size, job.sparsity and job.sparsity.text, job.budget, job.tokens, job.seed]
    files = [(str(file.path), file.size, file.changed) for file in source.files]
    told = [__version__, asked, files, None if text is None else text[1]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _write(
    job: Job,
    source: Checkpoint,
    base: Checkpoint,
    work: Work,
    fitted: Fitted | None,
    sketch_head: bool,
    progress: Progress,
) -> None:
    """The folder, tensor by tensor."""
    method = None if fitted is None else fitted.method
    spec = dataclasses.replace(base.spec, sparsity=method)
    made = Changed(base, spec, *((fitted.added, fitted.orders) if fitted else ({}, {})))
    extra: dict[str, Any] = {"sketch_head": True} if sketch_head else {}

    def finish(folder: Path) -> None:
        work.copy_report(folder)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        licences = copy_licences(source.path, folder)
        facts = {name: told for name, told in report["made"].items() if name not in ("by", "model", "section")}
        card = model_card(source.about(), told_name(job.source), licences, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_checkpoint(
        job.target,
        spec,
        ((name, partial(made.tensor, name)) for name in spec.tensors()),
        base.tokenizer(),
        config_extra=extra,
        generation_config=base.generation_config,
        progress=progress,
        job=work.decided,
        release=made.release,
        finish=finish,
    )

"""What a conversion decides: the method with its settings, and the report about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondevice import __version__
from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import BITS
from ondevice.machine import cpu_name, memory_bytes
from ondevice.model import Model
from ondevice_convert.blocks_table import blocks_table
from ondevice_convert.budget import Budget, Choice
from ondevice_convert.fitted import Fitted
from ondevice_convert.methods import AUTO, AUTO_PLACES, KINDS
from ondevice_convert.quality import Quality, compare
from ondevice_convert.recipe import Recipe, make_recipe
from ondevice_convert.report import Report
from ondevice_convert.requantized import Requantized
from ondevice_convert.samples import Samples, gather
from ondevice_convert.sensitivity import PLACES, measure_sensitivity
from ondevice_convert.texts import Texts, split_text, written_text
from ondevice_convert.trial import Trial
from ondevice_convert.work import Work

if TYPE_CHECKING:
    from ondevice_convert.conversion import Job

Progress = Callable[[int, int, str], None]

POSITIONS = 8192
"""Of the text that samples are kept of."""
UNSEEN, FITTED = "unseen text", "fitted text"
ROUNDED, REORDERED = "rounded, over the source, unseen text", "all neurons in the new order, unseen text"
FITTED_WINDOWS = 2
"""Of the fitted text that quality is measured on, beside the unseen one."""


@dataclass(slots=True)
class Search:
    """Finds what to write.

    Args:
        job: what is asked for.
        source: the model.
        group_size: of rounded matrices; None where nothing is rounded.
        work: keeps what was found.
        text: contents and SHA-256 of the text; None if the model writes one.
        progress: hears of what takes long.
    """

    job: Job
    source: Checkpoint
    group_size: int | None
    work: Work
    text: tuple[str, str] | None
    progress: Progress
    quality: dict[str, Quality] = field(default_factory=dict, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    _base: Requantized | None = field(default=None, init=False)
    _before: Trial | None = field(default=None, init=False)
    _read: Texts | None = field(default=None, init=False)

    def run(self) -> tuple[Fitted | None, bool, Report]:
        """The method, whether the head is sketched, and the report."""
        job = self.job
        if self.text is not None:
            self._texts(None)  # a text that is too short is refused before any work
        if job.sparsity is None and self.text is None:
            return None, False, Report(self._made(None), self._weights(), notes=self._all_notes())
        trial = self._trial(self.base)
        texts = self._texts(trial)
        self._rounding(trial, texts)
        if job.sparsity is None:
            return None, False, Report(self._made(texts), self._weights(), self.quality, notes=self._all_notes())
        samples = self._samples(trial, texts)
        if job.sparsity.method == AUTO:
            choice = Budget(trial, samples, texts, job.budget).choose()
            return self._chosen(trial, texts, samples, choice)
        fitted = KINDS[job.sparsity.method].fit(self.base, samples, job.sparsity, self.progress)
        return fitted, False, self._measured(trial, texts, samples, fitted)

    @property
    def base(self) -> Requantized:
        """The model as it is rounded, dense."""
        if self._base is None:
            self._base = Requantized(self.source, self._recipe().forms)
        return self._base

    def _recipe(self) -> Recipe:
        """Which matrix gets how many bits; where they are mixed, this is measured, or was."""
        job = self.job
        if job.bits is None or job.bits in BITS:
            return make_recipe(self.source, job.bits, self.group_size)
        found = self.work.find("recipe")
        if found is not None:
            return Recipe.of(found[1])
        assert self.group_size is not None
        before = self._trial(self.source)
        texts = self._texts(before)
        samples = gather(before.dense, texts.fit, PLACES, POSITIONS, self.progress)
        sensitivity = measure_sensitivity(self.source, samples, self.group_size, self.progress)
        recipe = make_recipe(self.source, job.bits, self.group_size, sensitivity)
        self.work.keep("recipe", {}, recipe.document())
        return recipe

    def _trial(self, checkpoint: Checkpoint) -> Trial:
        """Tries models; all of a search are packed by one table."""
        if checkpoint is self.source:
            if self._before is None:
                self._before = Trial.of(self.source, "cpu", self.job.threads, self.progress)
            return self._before
        if self._before is not None:
            return Trial(checkpoint, self._before.ops, self.progress)
        return Trial.of(checkpoint, "cpu", self.job.threads, self.progress)

    def _texts(self, trial: Trial | None) -> Texts:
        """The text; a trial's dense model writes one, once for a job, where none was given."""
        if self._read is None:
            job, tokenizer, context = self.job, self.source.tokenizer(), self.source.spec.context_length
            if self.text is not None:
                assert job.text is not None
                self._read = split_text(*self.text, job.text, tokenizer, job.tokens, context)
            else:
                self._read = self.work.texts()
            if self._read is None:
                assert trial is not None
                model = Model(job.source, self.source.path, trial.dense, tokenizer)
                self._read = written_text(model, job.tokens, job.seed, self.progress)
                self.work.keep_texts(self._read)
        return self._read

    def _samples(self, trial: Trial, texts: Texts) -> Samples:
        assert self.job.sparsity is not None
        found = self.work.samples()
        if found is None:
            method = self.job.sparsity.method
            places = AUTO_PLACES if method == AUTO else KINDS[method].places
            found = gather(trial.dense, texts.fit, places, POSITIONS, self.progress)
            self.work.keep_samples(found)
        return found

    def _rounding(self, trial: Trial, texts: Texts) -> None:
        """What rounding costs by itself."""
        before, self._before = self._before or Trial(self.source, trial.ops, self.progress), None
        if not self.base.changes:
            return
        available = memory_bytes()[1]
        if available is not None and 2 * self.source.nbytes > available:
            self.notes.append("what rounding costs was not measured: the model before it does not fit into memory too")
            return
        label = "measuring what rounding costs"
        found = compare(before.dense, [trial.dense], texts.unseen, texts.window, self.progress, label)
        self.quality[ROUNDED] = found[0]

    def _measured(self, trial: Trial, texts: Texts, samples: Samples, fitted: Fitted) -> Report:
        """The report of a method that was asked for by name."""
        decoder = trial.decoder(fitted)
        unseen = [decoder, trial.reordered(fitted)] if fitted.orders else [decoder]
        self.quality |= zip((UNSEEN, REORDERED), trial.quality(unseen, texts.unseen, texts.window, "on unseen text"))
        del unseen
        some = texts.fit[: FITTED_WINDOWS * texts.window]
        self.quality[FITTED] = trial.quality([decoder], some, texts.window, "on fitted text")[0]
        dense, speed = trial.speeds([trial.decoder(fitted, "auto")])
        return self._report(texts, samples, fitted, (dense, speed))

    def _chosen(
        self, trial: Trial, texts: Texts, samples: Samples, choice: Choice
    ) -> tuple[Fitted | None, bool, Report]:
        """The report of what a budget allowed."""
        if choice.quality is not None:
            self.quality[UNSEEN] = choice.quality
        if choice.fitted is not None:
            some = texts.fit[: FITTED_WINDOWS * texts.window]
            decoder = trial.decoder(choice.fitted)
            self.quality[FITTED] = trial.quality([decoder], some, texts.window, "on fitted text")[0]
        report = self._report(texts, samples, choice.fitted, choice.speeds, choice)
        return choice.fitted, choice.sketch_head, report

    def _report(
        self, texts: Texts, samples: Samples, fitted: Fitted | None, speed: Any, choice: Choice | None = None
    ) -> Report:
        layers, notes = (fitted.layers, fitted.notes) if fitted else ((), ())
        curve, refused = (choice.curve, choice.notes) if choice else ((), ())
        blocks = blocks_table(self.base, samples, self.progress)
        notes = (*self._all_notes(), *notes, *refused, *blocks.notes)
        made = self._made(texts)
        if choice is not None:
            made["chosen"] = choice.name
        if fitted is not None:
            made["section"] = fitted.method.document()
        return Report(made, self._weights(), self.quality, speed, layers, curve, blocks.rows, notes)

    def _made(self, texts: Texts | None) -> dict[str, Any]:
        job = self.job
        made: dict[str, Any] = {
            "by": f"ondevice {__version__}",
            "model": told_name(job.source),
            "licence": self.source.about().get("licence") or "not stated",
            "bits": job.bits or "as they were",
            "group_size": self.group_size or "as they were",
            "sparsity": job.sparsity.text if job.sparsity else "dense",
            "tokens": job.tokens,
            "seed": job.seed,
            "processor": cpu_name(),
        }
        if job.sparsity and job.sparsity.method == AUTO:
            over = "the rounded model" if self.base.changes else "the dense model"
            made["budget"] = f"{100 * job.budget:g} % of perplexity over {over}, by the upper 95 % bound"
        if texts is not None:
            made |= {
                "text": texts.origin,
                "text_sha256": texts.sha256,
                "tokens_fitted_on": len(texts.fit),
                "tokens_unseen": len(texts.unseen),
                "window": texts.window,
            }
        return made

    def _weights(self) -> dict[str, Any]:
        before = self.source.describe()
        told = {"bytes_before": before["bytes"], "bits_per_weight_before": before["bits_per_weight"]}
        if not self.base.changes:
            return told
        after, errors = self.base.describe(), self.base.measured()
        worst = max(errors, key=lambda name: errors[name], default=None)
        return told | {
            "bytes_after": after["bytes"],
            "bits_per_weight_after": after["bits_per_weight"],
            "forms": {name: form["tensors"] for name, form in self._recipe().describe()["forms"].items()},
            "error_mean": sum(errors.values()) / max(1, len(errors)),
            "error_largest": f"{errors[worst]:.4f} of {worst}" if worst else "none",
        }

    def _all_notes(self) -> tuple[str, ...]:
        return (*self.notes, *self._recipe().notes)


def told_name(source: str) -> str:
    """What a model is called: without the folders that it lies in here."""
    path = Path(source)
    return path.name if path.exists() else source

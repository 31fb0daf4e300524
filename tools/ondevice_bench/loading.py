"""Loads what is measured: a model's file without its tokenizer, or random weights of a known shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ondevice.checkpoint import open_checkpoint
from ondevice.decoder import Decoder
from ondevice.model import compiling_progress, find, op_table
from ondevice.sparsity.head_sketch import add_wanted_sketch
from ondevice.sparsity.settings import SparsitySettings
from ondevice_bench.cases import Case, check
from ondevice_bench.parts import profile_table
from ondevice_bench.random_weights import FLOAT_BITS, RandomWeights
from ondevice_bench.shapes import shape_spec
from ondevice_bench.sparsity import Sparsity, force

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """What is measured.

    Args:
        name: of a model or, where `bits` is given, of a shape.
        bits: of random weights; None reads a model.
        group_size: of random weights.
        sparsity: a method that skips, with random routers.
        sketch_head: whether the head has a sketch; None goes by the model.
        plan, kv_bits: see `ondevice.load`.
    """

    name: str
    bits: int | None = None
    group_size: int = 32
    sparsity: Sparsity | None = None
    sketch_head: bool | None = None
    plan: str = "auto"
    kv_bits: int | None = None

    def skipping(self, decoder: Decoder) -> str:
        """What its decoder skips: "dense", or the methods."""
        own = decoder.spec.sparsity
        methods = [self.sparsity.text] if self.sparsity else [own.name] if own else []
        return "+".join(methods if decoder.sketch is None else [*methods, "sketch-head"]) or "dense"

    @property
    def label(self) -> str:
        """Name and format as the results show them."""
        if self.bits is None:
            path = Path(self.name)
            return path.name if path.exists() else self.name
        groups = "" if self.bits == FLOAT_BITS else f" g{self.group_size}"
        return f"{self.name} shape, random {self.bits}-bit{groups}"


def load_decoder(
    source: Source,
    backend: str,
    threads: int | None,
    cases: Sequence[Case],
    profile: bool = False,
    progress: Progress | None = None,
) -> Decoder:
    """Packs a model and compiles its kernels.

    Args:
        backend, threads, progress: as of `ondevice.load`.
        cases: refused before anything is packed if the model cannot run them.
        profile: the op table must be able to account for its parts.

    Raises:
        OptionError: an impossible case, shape or format, or no profile.
    """
    ops = op_table(backend, threads, progress and compiling_progress(progress), source.kv_bits)
    if profile:
        profile_table(ops)
    with open_source(source, cases, progress) as checkpoint:
        check(cases, checkpoint.spec, source.name)
        # Random weights have all that a decoder asks of a checkpoint.
        weights = cast("Checkpoint", checkpoint)
        ops.admit(weights)
        with ops.keeping(weights, progress):
            settings = SparsitySettings(plan=source.plan)
            decoder = Decoder(weights, ops, progress, settings)
            if source.sparsity is not None:
                force(decoder, source.sparsity)
            # After that: hidden states as they will be.
            add_wanted_sketch(decoder, weights, source.sketch_head, settings, progress)
    ops.prepare(decoder.spec, progress and compiling_progress(progress))
    return decoder


def open_source(source: Source, cases: Sequence[Case], progress: Progress | None = None) -> Any:
    """What the weights come from, as a context manager: a file, or random ones, which are not made before asked for."""
    if source.bits is None:
        return open_checkpoint(find(source.name, progress))
    spec = shape_spec(source.name)
    if source.sparsity is not None:
        spec = source.sparsity.spec_for(spec, [case.batch for case in cases])
    return nullcontext(RandomWeights(spec, source.bits, source.group_size))

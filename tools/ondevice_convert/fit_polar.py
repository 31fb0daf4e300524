"""Polar sparsity for a finished model: routers of heads, and in relu models of neurons.

Source: Polar Sparsity (Shrestha et al. 2025), section 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import Tensor
from ondevice.commands.method_option import MethodOption
from ondevice.errors import OndeviceError, OptionError
from ondevice.sparsity.polar import UNITS, Polar, PolarHeads, PolarNeurons
from ondevice.spec import ModelSpec
from ondevice_convert.fit_polar_heads import fit_heads
from ondevice_convert.fit_polar_neurons import NeuronsFit, fit_neurons
from ondevice_convert.fitted import Fitted, LayerFit
from ondevice_convert.samples import Samples

Progress = Callable[[int, int, str], None] | None

POLAR_KEYS = {
    "heads": "0.7",
    "unit": "auto",
    "recall": "0.99",
    "rank": "auto",
    "batches": "1",
    "dense_layers": "0",
}
POLAR_PLACES = ("attention", "o", "ffn")
"""What `gather` must have kept."""
OF_NEURONS, OF_HEADS = ("recall", "rank", "batches"), ("unit", "dense_layers")
RANK = 1024
LARGEST_BATCH = 256
"""Recall is measured on batches of held-out samples, of which there must be some."""


def fit_polar(base: Checkpoint, samples: Samples, option: MethodOption, progress: Progress = None) -> Fitted:
    """Fits routers of heads in all layers but some, and in relu models routers of neurons in all layers.

    Args:
        base: the dense model.
        samples: with POLAR_PLACES.
        option: with POLAR_KEYS. heads: part of the heads that run, 1 for no routers of heads. unit: "head", "kv_group",
            or "auto", which is a group of heads where heads share keys and values: these are read as long as any of
            their heads runs. dense_layers: that run all heads, with + between, or "none". Of relu models: recall that
            the kept neurons must have; rank of their routers, "auto" is half of the width, at most 1024; batches:
            their sizes, with + between.
        progress: called with (layers done, layers in all, what is done).

    Raises:
        OptionError: a bad option, one that this model has no use for, or too few samples.
        OndeviceError: the recall is reached in no layer unless all neurons run.
    """
    spec = base.spec
    check_polar(option, spec)
    heads, notes = _heads(option, spec)
    batches, rank, recall = _batches(option), _rank(option, spec), option.number("recall")
    added: dict[str, Tensor] = {}
    fits: list[LayerFit] = []
    neurons: list[NeuronsFit] = []
    for i in range(spec.n_layers):
        if progress:
            progress(i, spec.n_layers, "routers of polar")
        if heads is not None and i not in heads.dense_layers:
            tensors, fit = fit_heads(base, samples, i, heads)
            added |= tensors
            fits.append(fit)
        if spec.activation == "relu":
            neurons.append(fit_neurons(base, samples, i, rank, batches, recall))
            added |= neurons[-1].tensors
            fits.append(neurons[-1].fit)
    if progress:
        progress(spec.n_layers, spec.n_layers, "routers of polar")
    table = tuple((batch, tuple(layer.kept[batch] for layer in neurons)) for batch in batches)
    if neurons:
        notes += _told(neurons, batches, recall, spec)
    method = Polar(PolarNeurons(rank, table) if neurons else None, heads)
    return Fitted(method, added, layers=tuple(fits), notes=tuple(notes))


def _told(neurons: Sequence[NeuronsFit], batches: Sequence[int], recall: float, spec: ModelSpec) -> list[str]:
    """What each batch size came to."""
    if all(layer.kept[batches[0]] == spec.d_ff for layer in neurons):
        raise OndeviceError(
            f"polar: a recall of {recall:g} at batch {batches[0]} takes all {spec.d_ff} neurons in every layer, so "
            "nothing would be skipped; lower recall, raise rank, give more text, or take another method"
        )
    notes = []
    for batch in batches:
        parts = [layer.kept[batch] / spec.d_ff for layer in neurons]
        least = min(layer.recalls[batch] for layer in neurons)
        notes.append(
            f"batch {batch}: a recall of {least:.4f} or more takes {sum(parts) / len(parts):.1%} of the neurons, in "
            f"layers from {min(parts):.1%} to {max(parts):.1%}"
        )
        whole = [str(layer.fit.layer) for layer in neurons if layer.kept[batch] == spec.d_ff]
        if whole:
            notes.append(f"batch {batch}: layers {', '.join(whole)} reach the recall only with all their neurons")
    return notes


def check_polar(option: MethodOption, spec: ModelSpec) -> None:
    """Refuses bad options, and those that would have no effect, by OptionError."""
    _heads(option, spec)
    _batches(option)
    _rank(option, spec)
    option.number("recall")
    no_heads = option.number("heads") == 1
    if no_heads and spec.activation != "relu":
        raise OptionError(
            f"--sparsity {option.text}: heads is 1, and polar skips neurons of relu models only (this one has "
            f"{spec.activation}), so nothing would be skipped; take fewer heads, or lte or cats"
        )
    reasons = {
        OF_NEURONS: spec.activation != "relu" and f"is of relu models' neurons, and this one has {spec.activation}",
        OF_HEADS: no_heads and "is of routers of heads, and heads is 1",
    }
    for keys, reason in reasons.items():
        for key in keys:
            if reason and option.values[key] != POLAR_KEYS[key]:
                raise OptionError(f"--sparsity {option.text}: {key} {reason}; leave it out")


def _heads(option: MethodOption, spec: ModelSpec) -> tuple[PolarHeads | None, list[str]]:
    share = option.number("heads")
    if share == 1:
        return None, []
    unit = option.word("unit", "auto", *UNITS)
    if unit == "auto":
        # No kernel leaves out keys and values before all heads that share them are idle.
        unit = "head" if spec.group == 1 else "kv_group"
    units = spec.n_heads if unit == "head" else spec.n_kv_heads
    # 0.29 * 100 is 28.999999999999996.
    kept = max(1, int(share * units + 1e-9))
    name = "heads" if unit == "head" else "groups of heads"
    if kept == units:
        raise OptionError(
            f"--sparsity {option.text}: this model has 1 of {name} in a layer, which cannot be left out; take heads=1 "
            "(relu models), unit=head, or another method"
        )
    note = f"heads={share:g} of {units} {name}: {kept} run in each layer ({kept / units:.0%})"
    return PolarHeads(kept, unit, _dense_layers(option, spec)), [note]


def _dense_layers(option: MethodOption, spec: ModelSpec) -> tuple[int, ...]:
    text = option.values["dense_layers"]
    if text == "none":
        return ()
    layers = {int(part) if re.fullmatch(r"\d{1,6}", part) else spec.n_layers for part in text.split("+")}
    if max(layers) >= spec.n_layers:
        raise OptionError(
            f"--sparsity {option.text}: dense_layers is {text!r}; give numbers from 0 to {spec.n_layers - 1} with + "
            "between, or none"
        )
    return tuple(sorted(layers))


def _batches(option: MethodOption) -> list[int]:
    text = option.values["batches"]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", part) and int(part) <= LARGEST_BATCH for part in text.split("+")):
        raise OptionError(
            f"--sparsity {option.text}: batches is {text!r}; give sizes up to {LARGEST_BATCH} with + between, as 1+8+32"
        )
    return sorted({int(part) for part in text.split("+")})


def _rank(option: MethodOption, spec: ModelSpec) -> int:
    if option.values["rank"] == "auto":
        return max(1, min(RANK, spec.d_model // 2))
    return option.whole("rank", spec.d_model)

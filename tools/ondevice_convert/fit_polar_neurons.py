"""Routers of the neurons of relu models: linear, of low rank, and as many neurons as keep a recall.

Source: Polar Sparsity (Shrestha et al. 2025), section 4.1 and algorithm 2. The routers are fitted in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import GROUP_SIZES, Quantized, Tensor, dequantize, quantize
from ondevice.errors import OptionError
from ondevice_convert.fit_polar_heads import largest
from ondevice_convert.fitted import LayerFit
from ondevice_convert.held_out import Floats, apart
from ondevice_convert.judged import Mask, judge, part_lost
from ondevice_convert.neurons import Neurons
from ondevice_convert.ridge import reduced_rank
from ondevice_convert.samples import Samples

RIDGE = 0.1
"""Penalty, as a part of the mean square of an input."""
STEP = 16
"""Neurons kept are a multiple of so many."""
BITS = 8
"""Of routers of quantized models, whose floats would be as large as what they save."""
SHUFFLES = 4
"""Times that samples are dealt into batches."""


@dataclass(frozen=True, slots=True)
class NeuronsFit:
    """The router of a layer.

    Args:
        tensors: by canonical name.
        kept: by batch size the neurons that have the recall.
        recalls: what recall they have, by batch size.
        fit: at the smallest batch size.
    """

    tensors: dict[str, Tensor]
    kept: dict[int, int]
    recalls: dict[int, float]
    fit: LayerFit


def fit_neurons(
    base: Checkpoint, samples: Samples, layer: int, rank: int, batches: Sequence[int], recall: float
) -> NeuronsFit:
    """Fits the router of a layer, and finds how many neurons it must keep.

    Args:
        base: the dense relu model.
        samples: with the places "attention" and "ffn".
        layer: its number.
        rank: of the router.
        batches: sizes, ascending.
        recall: part of the active neurons of a batch that must be kept on average, on samples held out.

    Raises:
        OptionError: a batch larger than the samples held out.
    """
    spec, p = base.spec, f"layers.{layer}.ffn_router."
    x, x_held_out = apart(samples, "attention", layer, spec.d_ff)
    inputs, inputs_held_out = apart(samples, "ffn", layer, spec.d_ff)
    if batches[-1] > len(x_held_out):
        raise OptionError(
            f"batches: a batch of {batches[-1]} is more than the {len(x_held_out)} samples that are held out; "
            "give a longer text or smaller batches"
        )
    neurons = Neurons.of(base, layer)
    like = base.tensor(f"layers.{layer}.up.weight")
    matrices = [_stored(w, like) for w in reduced_rank(x, _active(neurons, inputs), rank, RIDGE)]
    first, second = (dequantize(w) for w in matrices)
    logits = x_held_out @ first.T @ second.T
    gate, up = neurons.factors(inputs_held_out)
    h = gate * up
    active = _active(neurons, inputs_held_out) > 0
    kept, recalls = {}, {}
    for batch in batches:
        curve = recall_curve(logits, active, batch)
        # The last one is 1 up to rounding.
        enough = int(np.argmax(curve >= min(recall, curve[-1]))) + 1
        kept[batch] = min(spec.d_ff, -(-enough // STEP) * STEP)
        recalls[batch] = float(curve[kept[batch] - 1])
    mask = _union(logits, batches[0], kept[batches[0]])
    sizes = np.abs(h) * neurons.reach
    fit = judge(layer, mask, sizes, lambda chosen: part_lost(h, neurons.down, chosen), by_row=True)
    tensors = dict(zip((p + "0.weight", p + "1.weight"), matrices))
    return NeuronsFit(tensors, kept, recalls, replace(fit, recall=recalls[batches[0]]))


def recall_curve(logits: Floats, active: Mask, batch: int, seed: int = 0) -> NDArray[np.float64]:
    """Part of a batch's active neurons among its 1, 2 ... largest scores, mean over batches.

    Args:
        logits: [n, neurons]; a neuron's score is the sum of what is positive.
        active: [n, neurons].
        batch: samples of a batch, at most n.
        seed: of how they are dealt.

    Returns:
        float64 [neurons], rising to 1.
    """
    random, count = np.random.default_rng(seed), len(logits) // batch
    curve = np.zeros(logits.shape[1])
    rounds = 1 if batch == 1 else SHUFFLES
    for _ in range(rounds):
        for rows in random.permutation(len(logits))[: count * batch].reshape(count, batch):
            wanted: Mask = np.asarray(active[rows].any(axis=0))
            order = np.argsort(-np.maximum(logits[rows], 0).sum(axis=0), kind="stable")
            curve += np.cumsum(wanted[order]) / wanted.sum() if wanted.any() else 1.0
    return curve / (rounds * count)


def _active(neurons: Neurons, x: Floats) -> Floats:
    """1 where a neuron's activation is not 0: [n, D]."""
    gate, up = neurons.factors(x)
    return ((up if neurons.gate is None else gate) > 0).astype(np.float32)


def _union(logits: Floats, batch: int, kept: int) -> Mask:
    """What neighbours in batches run: [n, neurons]; the last batch may be smaller."""
    mask = np.zeros(logits.shape, bool)
    for start in range(0, len(logits), batch):
        mask[start : start + batch] = largest(np.maximum(logits[start : start + batch], 0).sum(axis=0)[None], kept)
    return mask


def _stored(w: Floats, like: Tensor) -> Tensor:
    """A router's matrix in the form of the model's: quantized where that is, if groups divide it."""
    if not isinstance(like, Quantized):
        return w.astype(like.dtype)
    group = next((size for size in sorted(GROUP_SIZES, reverse=True) if w.shape[1] % size == 0), None)
    return w.astype(np.float16) if group is None else quantize(w, BITS, group)

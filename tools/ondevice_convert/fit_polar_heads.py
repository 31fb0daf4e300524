"""Routers of heads: logistic regression on whether a head is among those of the largest outputs.

Source: Polar Sparsity (Shrestha et al. 2025), section 4.2 and appendix C. Where heads share keys and values, the router
of a group is fitted to the group's output, and each of its heads gets it: a group's score is the largest of its heads'.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import dequantize
from ondevice.sparsity.polar import PolarHeads
from ondevice_convert.fitted import LayerFit
from ondevice_convert.held_out import Floats, apart
from ondevice_convert.judged import Mask, judge, part_lost
from ondevice_convert.samples import Samples

PENALTY = 0.1
"""On squared weights, of inputs of size 1."""
ITERATIONS = 100
SPREAD = 1e-3
"""Deviation of an input, as a part of the largest one's, below which it counts as so much: it says nothing."""


def fit_heads(
    base: Checkpoint, samples: Samples, layer: int, heads: PolarHeads
) -> tuple[dict[str, NDArray[np.float32]], LayerFit]:
    """The router of a layer.

    Args:
        base: the dense model.
        samples: with the places "attention" and "o".
        layer: its number.
        heads: settings; how many units the router shall keep.

    Returns:
        Its tensors by canonical name, and how it does on samples that were held out, where units contribute what they
        give through the output projection.
    """
    spec, p = base.spec, f"layers.{layer}."
    group = spec.group if heads.unit == "kv_group" else 1
    units = spec.n_heads // group
    x, x_held_out = apart(samples, "attention", layer, spec.n_heads * spec.head_dim)
    a, a_held_out = apart(samples, "o", layer, spec.n_heads * spec.head_dim)
    weight, bias = logistic(x, largest(_norms(a, units), heads.kept))
    o = dequantize(base.tensor(p + "o.weight"))
    base.release(p + "o.weight")
    kept = largest(x_held_out @ weight.T + bias, heads.kept)
    width = spec.head_dim * group
    fit = judge(
        layer,
        kept,
        _contributions(a_held_out, o, width),
        lambda mask: part_lost(a_held_out, o, np.repeat(mask, width, axis=1)),
        by_row=True,
        unit=group,
        what="heads",
    )
    tensors = {p + "head_router.weight": np.repeat(weight, group, axis=0)}
    return tensors | {p + "head_router.bias": np.repeat(bias, group)}, fit


def largest(scores: Floats, kept: int) -> Mask:
    """The k largest [n, units] of each row, as a mask; of equal ones the first."""
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, np.argsort(-scores, axis=1, kind="stable")[:, :kept], True, axis=1)
    return mask


def logistic(x: Floats, labels: Mask) -> tuple[Floats, Floats]:
    """Logistic regressions with a common input; a positive counts 1, a negative what part of all are positive.

    Args:
        x: [n, d].
        labels: [n, m].

    Returns:
        weight [m, d] and bias [m].
    """
    centre, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.maximum(spread, SPREAD * spread.max() or 1.0)
    even = (x - centre) / spread
    n, d, m = len(x), x.shape[1], labels.shape[1]
    positives = labels.mean()
    weights = (np.where(labels, 1.0, positives) / n).astype(np.float32)

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        own = flat.reshape(m, d + 1)
        logits = even @ own[:, :d].T.astype(np.float32) + own[:, d].astype(np.float32)
        errors = weights * (expit(logits) - labels)
        slopes = np.concatenate([errors.T @ even, errors.sum(axis=0)[:, None]], axis=1).astype(np.float64)
        slopes[:, :d] += PENALTY * own[:, :d]
        missed = weights * (np.logaddexp(0, logits) - labels * logits)
        return float(missed.sum(dtype=np.float64)) + PENALTY / 2 * float(np.square(own[:, :d]).sum()), slopes.ravel()

    found = minimize(loss, np.zeros(m * (d + 1)), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS})
    own = found.x.reshape(m, d + 1)
    weight = own[:, :d] / spread
    return weight.astype(np.float32), (own[:, d] - weight @ centre).astype(np.float32)


def _norms(a: Floats, units: int) -> Floats:
    """Of each unit's outputs: [n, units]."""
    norms: Floats = np.linalg.norm(a.reshape(len(a), units, -1), axis=2)
    return norms


def _contributions(a: Floats, o: Floats, width: int) -> Floats:
    """Length [n, units] of what each unit of some inputs [n, inputs] gives through o [d, inputs]."""
    parts = [slice(start, start + width) for start in range(0, a.shape[1], width)]
    return np.stack([np.linalg.norm(a[:, part] @ o[:, part].T, axis=1) for part in parts], axis=1)

"""A sketch of the vocabulary head: so few bits that all words can be scored with them, and how far off each score is.

With W the head less the mean of its rows, scores are the mean's product plus (W D) (R x), where R x has uncorrelated
values of size 1 for hidden states x like the model's own, and W D R = W. The first values are the combinations in which
logits differ most; they get 4 bits, the others 2. Both parts are turned at random, after which errors of rounding are
normally distributed: a word's is about as large as its row's rounding error times the size of R x. That bound needs no
calibration. The hidden states that R comes from only decide how small the errors are, not whether the bound holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Quantized, Tensor, dequantize, pack
from ondevice.errors import NumericalError, OptionError

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.decoder import Decoder
    from ondevice.sparsity.settings import SparsitySettings
    from ondevice.spec import ModelSpec

FINE = 64
"""Values of 4 bits; the others have 2."""
STATES = 512
"""Hidden states that directions are taken from: of one sequence of random words, which costs one short prompt."""
TRUST = 0.5
"""Weight of what those states show, against all directions being alike: text is not random words."""
MARGIN = 4.0
"""Deviations that a word's score may be too low by: a normal distribution exceeds them 3 times in 100,000."""
LARGEST_GROUP = 512
ROWS = 4096
"""Of the head that are worked on at once: all as floats would take more memory than the model."""
STEPS = {4: 0.335, 2: 0.996}
"""Steps of the best even rounding of a normal distribution to so many bits, in its deviations."""


@dataclass(frozen=True, slots=True)
class SketchTensors:
    """What a table packs.

    Args:
        rotation: float [d + 1, d]: R, then the mean of the head's rows.
        fine: 4 bits [vocab, FINE].
        coarse: 2 bits [vocab, d - FINE].
        bias: of the head, float [vocab] or None.
        errors: float16 [vocab, 1]: the deviation of each score's error where R x has size 1.
    """

    rotation: NDArray[Any]
    fine: Quantized
    coarse: Quantized
    bias: Tensor | None
    errors: NDArray[np.float16]


def too_narrow(spec: ModelSpec) -> str | None:
    """Why a model's head can have no sketch; None if it can."""
    if spec.d_model % FINE == 0 and spec.d_model >= 2 * FINE:
        return None
    return (
        f"a sketch of the head needs hidden states of a multiple of {FINE} values, at least {2 * FINE}, and this "
        f"{spec.architecture} model's have {spec.d_model}"
    )


def add_wanted_sketch(
    decoder: Decoder,
    checkpoint: Checkpoint,
    asked: bool | None,
    settings: SparsitySettings,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Gives a decoder a sketch of its head if the user asks for it or, where they say nothing, the model does.

    Args:
        asked: by the user; None goes by the model, unless it runs dense.
        settings: of skipping work.
        checkpoint, progress: as of `add_sketch`.

    Raises:
        OptionError: asked for, and not possible.
        SparsityError: the model asks for it, the backend has none, and settings are strict.
    """
    if asked is None:
        asked = checkpoint.prefers_sketch and not settings.dense
        if asked and not decoder.ops.has_sketches:
            settings.fall_back(f"the {decoder.ops.name} backend has no sketch of the head, which this model asks for")
            return
    if asked:
        add_sketch(decoder, checkpoint, progress)


def add_sketch(
    decoder: Decoder, checkpoint: Checkpoint, progress: Callable[[int, int, str], None] | None = None
) -> None:
    """Gives a decoder a sketch of its head.

    Args:
        checkpoint: that it was made of.
        progress: called with (0, 0, what) before the work, where there is some.

    Raises:
        OptionError: the head is too narrow, or the backend has no sketches.
    """
    spec = decoder.spec
    problem = too_narrow(spec)
    if problem:
        raise OptionError(f"{problem}: leave sketch_head out")

    def tensors() -> SketchTensors:
        if progress:
            progress(0, 0, "sketching the head")
        name = "embed" if spec.tied_head else "head"
        bias = checkpoint.tensor(f"{name}.bias") if f"{name}.bias" in spec.tensors() else None
        return sketch_tensors(checkpoint.tensor(f"{name}.weight"), bias, _states(decoder))

    decoder.sketch = decoder.ops.pack_sketch(decoder.head, tensors, (spec.vocab_size, spec.d_model))


def sketch_tensors(head: Tensor, bias: Tensor | None, states: NDArray[np.float32]) -> SketchTensors:
    """A sketch.

    Args:
        head: [vocab, d]; d a multiple of FINE and larger.
        bias: [vocab] or None.
        states: [n, d], what the head is multiplied by.
    """
    mean, spread = _moments(head)
    directions, rotation = _directions(spread, states)
    fine: list[Quantized] = []
    coarse: list[Quantized] = []
    errors = []
    for rows in _rows(head):
        turned = ((rows - mean) @ directions).astype(np.float32, copy=False)
        fine.append(_rounded(turned[:, :FINE], 4))
        coarse.append(_rounded(turned[:, FINE:], 2))
        off = turned - np.concatenate([dequantize(fine[-1]), dequantize(coarse[-1])], axis=1)
        errors.append(np.sqrt((off * off).sum(axis=1, keepdims=True)).astype(np.float16))
    return SketchTensors(_half(np.vstack([rotation, mean])), _joined(fine), _joined(coarse), bias, np.vstack(errors))


def _states(decoder: Decoder) -> NDArray[np.float32]:
    """The same random words for everybody, so that a model's sketch is always the same."""
    count = min(STATES, decoder.spec.context_length)
    words = np.random.default_rng(0).integers(0, decoder.spec.vocab_size, count)
    states = decoder.states(words.tolist())
    if not np.isfinite(states).all():
        raise NumericalError("NaN or infinite hidden states, so the head cannot be sketched: damaged weights")
    return states


def _rows(head: Tensor) -> Iterator[NDArray[np.float32]]:
    for start in range(0, head.shape[0], ROWS):
        some = slice(start, start + ROWS)
        yield dequantize(head.rows(some) if isinstance(head, Quantized) else head[some])


def _moments(head: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Mean and covariance of the rows."""
    sums, products = np.zeros(head.shape[1]), np.zeros((head.shape[1],) * 2)
    for rows in _rows(head):
        sums += rows.sum(axis=0, dtype=np.float64)
        products += rows.T @ rows
    mean = sums / head.shape[0]
    return mean.astype(np.float32), products / head.shape[0] - np.outer(mean, mean)


def _directions(
    spread: NDArray[np.float64], states: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """D [d, d] and R = D^-1, the values of R x uncorrelated, those in which logits differ most first."""
    x, d = states.astype(np.float64), states.shape[1]
    alike = np.eye(d) * max(x.var(axis=0).mean(), np.finfo(np.float32).tiny)
    root = np.linalg.cholesky(TRUST * x.T @ x / len(x) + (1 - TRUST) * alike)
    _, vectors = np.linalg.eigh(root.T @ spread @ root)
    turn, random = np.zeros((d, d)), np.random.default_rng(1)
    for start, end in ((0, FINE), (FINE, d)):
        turn[start:end, start:end] = np.linalg.qr(random.standard_normal((end - start,) * 2))[0]
    turned = vectors[:, ::-1] @ turn
    return (root @ turned).astype(np.float32), np.linalg.solve(root.T, turned).T.astype(np.float32)


def _rounded(values: NDArray[np.float32], bits: int) -> Quantized:
    """Rounds normally distributed values, such that a row's product with its rounding is that with itself.

    Rounding to the nearest makes rows shorter, which would lower the score of exactly those words that fit best.
    """
    width = values.shape[1]
    group = min(width & -width, LARGEST_GROUP)
    groups = values.reshape(len(values), -1, group)
    middle = 2 ** (bits - 1) - (0.5 if bits == 2 else 0)
    step = STEPS[bits] * np.sqrt((groups * groups).mean(axis=-1, keepdims=True))
    step = np.maximum(step, np.finfo(np.float32).tiny)
    codes = np.clip(np.rint(groups / step + middle), 0, 2**bits - 1)
    near = (codes - middle) * step
    overlap = (groups * near).sum(axis=-1, keepdims=True)
    length = (groups * groups).sum(axis=-1, keepdims=True)
    scales = (step * np.where(overlap > 0, length / np.where(overlap > 0, overlap, 1), 1))[..., 0].astype(np.float16)
    packed = pack(codes.astype(np.uint8).reshape(values.shape), bits)
    return Quantized(packed, scales, None if bits == 4 else scales * np.float16(-middle), bits, group)


def _joined(parts: list[Quantized]) -> Quantized:
    biases = None if parts[0].biases is None else np.concatenate([p.biases for p in parts if p.biases is not None])
    packed, scales = np.concatenate([p.packed for p in parts]), np.concatenate([p.scales for p in parts])
    return Quantized(packed, scales, biases, parts[0].bits, parts[0].group_size)


def _half(matrix: NDArray[np.float32]) -> NDArray[Any]:
    """float16, unless the largest number is too large for it or too small for others to keep their digits."""
    return matrix.astype(np.float16 if 1e-3 < np.abs(matrix).max() < 6e4 else np.float32)

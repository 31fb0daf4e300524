"""Linear predictors in closed form: ridge regression, of full or of reduced rank.

Penalties are parts of the mean square of an input, so that one value suits models of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_NOTHING = 1e-10
"""Mean square, as a part of the largest direction's, that is rounding and no direction of its own."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Inputs in the directions in which they vary; any number of predictors and penalties share it.

    Args:
        x: the inputs [n, d], less their mean.
        mean: [d]; zeros without an intercept.
        intercept: whether predictors have one.
        directions: [d, k] orthonormal, k at most n and d.
        squares: [k] mean squares along them.
    """

    x: Floats
    mean: Floats
    intercept: bool
    directions: Floats
    squares: Floats

    @classmethod
    def of(cls, x: Floats, intercept: bool = True) -> Spectrum:
        """Decomposes the smaller of the two products of x [n, d] with itself."""
        mean: Any = x.mean(axis=0) if intercept else np.zeros(x.shape[1], np.float32)
        x = (x - mean).astype(np.float32)
        n, d = x.shape
        exact = x.astype(np.float64)
        squares, vectors = scipy.linalg.eigh((exact.T @ exact if d <= n else exact @ exact.T) / n)
        there = squares > _NOTHING * squares[-1]
        squares, vectors = squares[there], vectors[:, there]
        if d > n:
            vectors = exact.T @ vectors / np.sqrt(squares * n)
        return cls(x, mean, intercept, vectors.astype(np.float32), squares.astype(np.float32))

    def penalized(self, ridge: float) -> Floats:
        """Mean squares [k] with the penalty added."""
        sizes: Floats = self.squares.copy()
        sizes += np.float32(ridge * self.squares.sum() / self.x.shape[1])
        return sizes

    def towards(self, y: Floats) -> Floats:
        """Mean products [k, m] of the directions with targets y [n, m]."""
        coordinates: Floats = self.x @ self.directions
        products: Floats = coordinates.T @ y
        products /= np.float32(len(y))
        return products


def linear(spectrum: Spectrum, y: Floats, ridge: float) -> tuple[Floats, Floats]:
    """Ridge regression.

    Args:
        spectrum: of the inputs [n, d].
        y: targets [n, m].
        ridge: penalty, as a part of the mean square of an input.

    Returns:
        weight [m, d] and intercept [m], which is 0 if the spectrum has none.
    """
    centre: Any = y.mean(axis=0) if spectrum.intercept else np.zeros(y.shape[1], np.float32)
    products = spectrum.towards(y - centre)
    products /= spectrum.penalized(ridge)[:, None]
    weight: Floats = products.T @ spectrum.directions.T
    return weight, centre - weight @ spectrum.mean


def reduced_rank(x: Floats, y: Floats, rank: int, ridge: float) -> tuple[Floats, Floats]:
    """The two thin matrices whose product predicts best: second @ first @ x is near y, without an intercept.

    Args:
        x: inputs [n, d].
        y: targets [n, m].
        rank: of the product.
        ridge: penalty, as a part of the mean square of an input.

    Returns:
        first [rank, d], whose values are of size 1 and uncorrelated, and second [m, rank]. Where inputs or targets
        have fewer directions than `rank`, the others are 0.
    """
    return of_rank(Spectrum.of(x, intercept=False), y, rank, ridge)


def of_rank(spectrum: Spectrum, y: Floats, rank: int, ridge: float) -> tuple[Floats, Floats]:
    """As `reduced_rank`, of inputs that are decomposed already; of both less their means where the spectrum
    has an intercept.

    Source: Izenman, Reduced-rank regression for the multivariate linear model (1975), section 2. With whitened inputs
    the best predictions of a rank are those of full rank in the directions where they are largest.
    """
    whitening = spectrum.directions / np.sqrt(spectrum.penalized(ridge))
    products = spectrum.towards(y - y.mean(axis=0) if spectrum.intercept else y)
    whole = products / np.sqrt(spectrum.penalized(ridge))[:, None]
    exact = whole.astype(np.float64)
    if len(whole) <= whole.shape[1]:
        main = scipy.linalg.eigh(exact @ exact.T)[1][:, ::-1][:, :rank]
    else:
        main = scipy.linalg.svd(exact, full_matrices=False)[0][:, :rank]
    main = main.astype(np.float32)
    first, second = np.zeros((rank, len(whitening)), np.float32), np.zeros((y.shape[1], rank), np.float32)
    first[: main.shape[1]] = (whitening @ main).T
    second[:, : main.shape[1]] = whole.T @ main
    return first, second

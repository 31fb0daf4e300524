"""Closed forms and gradient steps of routers."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice_convert.gradient import LabelLoss, NormLoss, Parameters, descend, predicted_norms
from ondevice_convert.ridge import Spectrum, linear, of_rank, reduced_rank


def data(n: int, d: int, m: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, d)) @ random.standard_normal((d, d)) / np.sqrt(d) + 0.5
    return x.astype(np.float32), random.standard_normal((n, m)).astype(np.float32)


@pytest.mark.parametrize(("n", "d"), [(200, 12), (30, 40)])
def test_ridge_equals_its_formula(n: int, d: int) -> None:
    x, y = data(n, d, 5)
    weight, bias = linear(Spectrum.of(x), y, 0.1)
    a, b = (x - x.mean(0)).astype(float), (y - y.mean(0)).astype(float)
    penalty = 0.1 * (a**2).mean()
    wanted = np.linalg.solve(a.T @ a / n + penalty * np.eye(d), a.T @ b / n).T
    assert np.abs(weight - wanted).max() < 1e-4
    assert np.abs(bias - (y.mean(0) - wanted @ x.mean(0))).max() < 1e-4


def test_ridge_without_intercept() -> None:
    x, y = data(200, 12, 5)
    weight, bias = linear(Spectrum.of(x, intercept=False), y, 1e-6)
    assert np.abs(weight - np.linalg.lstsq(x.astype(float), y.astype(float))[0].T).max() < 1e-3
    assert not bias.any()


@pytest.mark.parametrize(("d", "m"), [(12, 20), (20, 12)])
def test_reduced_rank_is_the_best_of_its_rank(d: int, m: int) -> None:
    x, y = data(300, d, m)
    y += x @ np.random.default_rng(3).standard_normal((d, m)).astype(np.float32)
    first, second = reduced_rank(x, y, 4, 1e-7)
    assert first.shape == (4, d) and second.shape == (m, 4)
    # Without a penalty the best is the projection of the predictions of full rank on their first directions.
    full = x @ np.linalg.lstsq(x.astype(float), y.astype(float))[0]
    left, values, right = np.linalg.svd(full, full_matrices=False)
    best = (left[:, :4] * values[:4]) @ right[:4]
    assert np.abs(x @ first.T @ second.T - best).max() < 2e-2 * np.abs(best).max()
    assert np.abs((x @ first.T).T @ (x @ first.T) / 300 - np.eye(4)).max() < 1e-2


def test_full_rank_is_ridge_and_more_rank_than_there_is_stays_zero() -> None:
    x, y = data(200, 6, 3)
    spectrum = Spectrum.of(x)
    first, second = of_rank(spectrum, y, 8, 0.5)
    assert np.abs(second @ first - linear(spectrum, y, 0.5)[0]).max() < 1e-4
    assert first.shape == (8, 6) and not first[3:].any() and not second[:, 3:].any()


def slope_of(loss: NormLoss | LabelLoss, parameters: Parameters, which: int, at: tuple[int, ...]) -> float:
    """Numerical derivative of a loss."""
    values = []
    for step in (1e-3, -1e-3):
        moved = [p.astype(np.float64) for p in parameters]
        moved[which][at] += step
        values.append(loss.judge(tuple(moved)))  # type: ignore[arg-type]
    return (values[0] - values[1]) / 2e-3


def test_gradients() -> None:
    x, y = data(50, 6, 4)
    random = np.random.default_rng(1)
    rows = np.arange(50)
    router = (random.standard_normal((8, 6)).astype(np.float32), random.standard_normal((4, 8)).astype(np.float32))
    norms = NormLoss(x, np.abs(y))
    labels = LabelLoss(x, y > 0, np.abs(y))
    scorer = (router[0][:4], random.standard_normal(4).astype(np.float32))
    for loss, parameters in ((norms, router), (labels, scorer)):
        for which, slopes in enumerate(loss.gradient(parameters, rows)):
            assert slopes.shape == parameters[which].shape
            for at in [(1,) * slopes.ndim, (2,) * slopes.ndim]:
                assert abs(slopes[at] - slope_of(loss, parameters, which, at)) < 2e-2 * np.abs(slopes).max()


def test_steps_learn_and_never_end_worse_than_the_start() -> None:
    random = np.random.default_rng(4)
    x = random.standard_normal((600, 6)).astype(np.float32)
    y = np.abs(np.maximum(x @ random.standard_normal((6, 8)).astype(np.float32), 0)[:, :4])
    start = (0.3 * random.standard_normal((16, 6)).astype(np.float32), 0.3 * np.ones((4, 16), np.float32))
    loss, unseen = NormLoss(x[:500], y[:500]), NormLoss(x[500:], y[500:])
    learned = descend(start, loss.gradient, unseen.judge, 500, 300, 0.01)
    assert unseen.judge(learned) < 0.3 * unseen.judge(start)
    assert descend(start, loss.gradient, unseen.judge, 500, 0, 0.01) is start

    def backwards(parameters: Parameters, rows: np.ndarray) -> Parameters:
        return tuple(-slopes for slopes in loss.gradient(parameters, rows))

    assert descend(start, backwards, unseen.judge, 500, 300, 0.01) is start


def test_what_a_router_predicts_is_a_length() -> None:
    x = np.array([[1.0, -2.0]], np.float32)
    first, second = np.array([[1, 0], [0, 1]], np.float32), np.array([[-3, 1]], np.float32)
    assert predicted_norms(x, first, second).tolist() == [[3.0]]

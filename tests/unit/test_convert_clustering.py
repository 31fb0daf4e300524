"""Balanced clusters of neurons."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.errors import OptionError
from ondevice_convert import clustering
from ondevice_convert.clustering import balanced_clusters


def planted(clusters: int, size: int, width: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around some directions, in random order and of random lengths, and which direction each is of."""
    random = np.random.default_rng(seed)
    mine = random.permutation(np.repeat(np.arange(clusters), size))
    rows = random.standard_normal((clusters, width))[mine] + 0.1 * random.standard_normal((len(mine), width))
    return (rows * random.uniform(0.1, 10, (len(mine), 1))).astype(np.float32), mine


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("width", [24, 1024])
def test_clusters_that_are_there_are_found(exact: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "EXACT_UP_TO", 4096 if exact else 0)
    rows, mine = planted(6, 16, width)
    order = balanced_clusters(rows, 16)
    found = mine[order].reshape(6, 16)
    together = sum(int(np.bincount(group).max()) for group in found)
    assert together >= 80


def likeness(rows: np.ndarray, order: np.ndarray, size: int) -> float:
    """Mean length of the clusters' means of unit rows."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return float(np.linalg.norm(units[order].reshape(-1, size, rows.shape[1]).mean(axis=1), axis=1).mean())


@pytest.mark.parametrize("exact", [True, False])
def test_random_rows_become_more_alike_in_groups_of_equal_size(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "EXACT_UP_TO", 4096 if exact else 0)
    rows = np.random.default_rng(1).standard_normal((240, 8)).astype(np.float32)
    order = balanced_clusters(rows, 12)
    assert sorted(order) == list(range(240))
    assert likeness(rows, order, 12) > 2 * likeness(rows, np.arange(240), 12)
    groups = order.reshape(-1, 12)
    assert (np.diff(groups, axis=1) > 0).all() and (np.diff(groups[:, 0]) > 0).all()


def test_the_same_rows_give_the_same_order_and_their_lengths_do_not_count() -> None:
    rows, _ = planted(4, 8)
    order = balanced_clusters(rows, 8)
    assert np.array_equal(order, balanced_clusters(rows.copy(), 8))
    assert np.array_equal(order, balanced_clusters(rows * np.float32(4), 8))


def test_bidding_is_nearly_the_best_assignment() -> None:
    from scipy.optimize import linear_sum_assignment

    scores = np.random.default_rng(2).standard_normal((200, 20)).astype(np.float32)
    mine = clustering._bid(scores, 10)
    assert (np.bincount(mine, minlength=20) == 10).all()
    rows, seats = linear_sum_assignment(np.repeat(scores, 10, axis=1), maximize=True)
    best = scores[rows, seats // 10].sum()
    assert scores[np.arange(200), mine].sum() > best - 200 * 0.021 * scores.std()


def test_those_whom_bidding_leaves_get_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "BIDDING", 1)
    scores = np.zeros((40, 4), np.float32)
    scores[:, 0] = 1
    assert (np.bincount(clustering._bid(scores, 10)) == 10).all()


def test_equal_and_empty_rows_are_no_problem() -> None:
    assert sorted(balanced_clusters(np.zeros((32, 4), np.float32), 8)) == list(range(32))
    assert sorted(balanced_clusters(np.ones((32, 4), np.float32), 8)) == list(range(32))


@pytest.mark.parametrize("size", [1, 24])
def test_one_cluster_or_single_neurons_stay_in_order(size: int) -> None:
    rows = np.random.default_rng(0).standard_normal((24, 4)).astype(np.float32)
    assert np.array_equal(balanced_clusters(rows, size), np.arange(24))


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(OptionError, match="clusters of 5 do not divide 24 neurons; take a divisor of 24"):
        balanced_clusters(np.ones((24, 4), np.float32), 5)


def test_progress_ends_at_its_end() -> None:
    seen: list[tuple[int, int, str]] = []
    balanced_clusters(planted(4, 8)[0], 8, lambda *said: seen.append(said))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1]


def test_rounds_make_clusters_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "EXACT_UP_TO", 0)
    rows = np.random.default_rng(1).standard_normal((480, 8)).astype(np.float32)
    many = likeness(rows, balanced_clusters(rows, 12), 12)
    monkeypatch.setattr(clustering, "ROUNDS", 1)
    assert many > 1.03 * likeness(rows, balanced_clusters(rows, 12), 12)

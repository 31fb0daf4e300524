"""How large groups may be."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from ondevice_convert.granularity import Granularity, granularity, why_refused
from tests.unit.calibrated import calibrated


def test_larger_groups_lose_more_and_all_of_them_nothing(tmp_path: Any) -> None:
    base, samples = calibrated(tmp_path / "model")
    found = granularity(base, samples, 1, (0.5, 0.8, 1.0))
    lost = {(one.block, one.order): one.oracle_lost for one in found}
    # 64 and 128 do not divide 96 neurons; single neurons have one order.
    assert {block for block, _ in lost} == {1, 4, 16, 32} and len(found) == 10
    for order in ("model", "clustered", "cofiring"):
        curve = [lost[1, "model"], *(lost[block, order] for block in (4, 16, 32))]
        assert all(one[0] < other[0] for one, other in pairwise(curve))
    assert all(half > most > everything == 0 for half, most, everything in lost.values())
    assert all(one.layer == 1 and one.densities == (0.5, 0.8, 1.0) for one in found)


def made(block: int, order: str, *lost: float) -> list[Granularity]:
    return [Granularity(i, block, order, (0.5,), (one,)) for i, one in enumerate(lost)]


def test_a_refusal_names_the_best_order_and_what_single_neurons_lose() -> None:
    measured = [*made(1, "model", 0.01, 0.03), *made(32, "model", 0.3, 0.3), *made(32, "cofiring", 0.1, 0.2)]
    assert why_refused(measured, 32, 0.5, 0.05) == (
        "groups of 32: a perfect choice of 50% of them loses 15.0% of the output's square "
        "(cofiring order, single neurons 2.0%), above the limit of 5.0%"
    )


@pytest.mark.parametrize(("block", "density", "most"), [(32, 0.5, 0.2), (16, 0.5, 0.05), (32, 0.7, 0.05)])
def test_nothing_is_refused_within_the_limit_or_unmeasured(block: int, density: float, most: float) -> None:
    assert why_refused(made(32, "model", 0.1, 0.2), block, density, most) is None

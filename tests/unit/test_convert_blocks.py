"""What groups of neurons give, and what is lost without some of them."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.ops.reference_activation import activate
from ondevice_convert import neurons as neurons_file
from ondevice_convert.blocks import block_norms, border_at, judge, largest, lost_without
from ondevice_convert.neurons import Neurons
from ondevice_convert.orders import firing, groups_in


def random_neurons(gated: bool = True, activation: str = "silu") -> tuple[Neurons, np.ndarray]:
    """12 neurons of width 6 with biases, and 20 inputs."""
    random = np.random.default_rng(0)
    gate, up, down = (random.standard_normal(shape).astype(np.float32) for shape in ((12, 6), (12, 6), (6, 12)))
    bias = random.standard_normal(12).astype(np.float32)
    x = random.standard_normal((20, 6)).astype(np.float32)
    return Neurons(gate if gated else None, up, down, bias, bias[::-1].copy(), activation), x


def outputs(neurons: Neurons, x: np.ndarray) -> np.ndarray:
    """What each neuron adds [n, D, d], in float64."""
    up = x.astype(float) @ neurons.up.T + neurons.up_bias
    if neurons.gate is None:
        h = activate(up, neurons.activation)
    else:
        h = activate(x.astype(float) @ neurons.gate.T + neurons.gate_bias, neurons.activation) * up
    return h[:, :, None] * neurons.down.T


@pytest.fixture(params=[1, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples at once, and each by itself."""
    monkeypatch.setattr(neurons_file, "CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    ("gated", "activation"), [(True, "silu"), (False, "relu"), (False, "gelu"), (True, "gelu_tanh")]
)
@pytest.mark.parametrize("block", [1, 3, 4])
def test_norms_and_losses_equal_their_definition(gated: bool, activation: str, block: int) -> None:
    neurons, x = random_neurons(gated, activation)
    groups = np.random.default_rng(1).permutation(12).reshape(-1, block)
    each = outputs(neurons, x)[:, groups].sum(axis=2)
    assert np.abs(block_norms(neurons, x, groups) - np.linalg.norm(each, axis=2)).max() < 1e-4
    mask = np.random.default_rng(2).random((20, len(groups))) < 0.6
    whole = (each.sum(axis=1) ** 2).sum()
    wanted = ((each * ~mask[:, :, None]).sum(axis=1) ** 2).sum() / whole
    all_of_them, some = lost_without(neurons, x, groups, [np.ones_like(mask), mask])
    assert all_of_them == 0 and abs(some - wanted) < 1e-5


def test_single_neurons_lose_what_their_layer_says() -> None:
    neurons, x = random_neurons()
    groups = np.arange(12).reshape(-1, 1)
    norms = block_norms(neurons, x, groups)
    gate, up = neurons.factors(x)
    told = neurons.lost(gate * up, norms, [0.5])
    assert abs(lost_without(neurons, x, groups, [largest(norms, 120)])[0] - told[0]) < 1e-6


def test_a_perfect_choice_keeps_all_of_the_oracles_benefit() -> None:
    neurons, x = random_neurons()
    groups = np.arange(12).reshape(-1, 2)
    norms = block_norms(neurons, x, groups)
    perfect = judge(3, neurons, x, groups, norms, largest(norms, 60))
    assert (perfect.layer, perfect.unit, perfect.density, perfect.recall) == (3, 2, 0.5, 1.0)
    assert perfect.lost == perfect.oracle_lost < perfect.random_lost and perfect.oracle_share == 1
    worst = judge(3, neurons, x, groups, norms, largest(-norms, 60))
    assert worst.recall == 0 and worst.lost > worst.random_lost and worst.oracle_share < 0


def test_a_border_has_the_wanted_part_above_it() -> None:
    scores = np.random.default_rng(0).standard_normal((30, 10)).astype(np.float32)
    for density in (0.01, 0.5, 0.99):
        assert (scores > border_at(scores, density)).sum() == round(density * 300)
    assert (scores > border_at(scores, 1.0)).all() and not (scores > border_at(scores, 0.0)).any()


def test_neurons_that_fire_together_lie_together() -> None:
    random = np.random.default_rng(5)
    rows = np.repeat(random.standard_normal((4, 16)), 8, axis=0) + 0.05 * random.standard_normal((32, 16))
    mixed = random.permutation(32)
    up, down = rows[mixed].astype(np.float32), random.standard_normal((16, 32)).astype(np.float32)
    neurons = Neurons(None, up, down, 0.0, 0.0, "relu")
    x = random.standard_normal((400, 16)).astype(np.float32)
    for order in ("cofiring", "clustered"):
        groups = groups_in(order, neurons, 8, x)
        assert {tuple(sorted(group)) for group in mixed[groups] // 8} == {(kind,) * 8 for kind in range(4)}
    assert np.array_equal(groups_in("model", neurons, 8, x), np.arange(32).reshape(4, 8))
    assert np.abs(firing(neurons, x).mean(axis=1)).max() < 1e-5

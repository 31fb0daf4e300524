"""The MLX table with our Metal kernels: tiny models whose steps run the kernels' own text, emulated or on a GPU.

What only a Mac can show is Metal's compiler and its scheduling; tests/msl says what the emulator checks instead.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint.quantization import quantize
from tests.models.running import decode_logits, make_decoder, prefill_logits
from tests.models.sparse_cases import sparse_spec, sparse_tensors
from tests.models.sparse_running import batch_logits
from tests.tiny import tiny_spec, tiny_tensors

pytestmark = pytest.mark.judge

EXACT = 1e-4
IDS = np.random.RandomState(3).randint(0, 96, 70)


@pytest.fixture
def ops(metal: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A table whose kernels run on what `metal` is, in float32."""
    monkeypatch.setenv("ONDEVICE_MLX_DTYPE", "float32")
    from ondevice.ops.mlx_metal import MetalOps
    from tests.kernels.metal_home import running

    with running():
        yield MetalOps()


def ran(metal: Any, *names: str) -> bool:
    """Whether kernels of all these names have run."""
    texts = {run.kernel for run in metal.runs} if not metal.on_gpu else set(metal._names)
    return all(any(text.startswith(f"ondevice_{name}") for text in texts) for name in names)


KERNELS = {
    "lte": ("select_threshold", "sparse_ffn_hidden", "sparse_ffn_down", "selective_attention", "grouped_hidden"),
    "spark": ("statistical_topk", "sparse_ffn_hidden", "topk_scores", "topk_merge"),
    "polar": ("select_topk", "select_votes", "sparse_ffn_hidden", "selective_attention", "attention_merge"),
    "polar_groups": ("select_topk", "selective_attention"),
    "cats": ("list_mask", "sparse_ffn_hidden"),
}
"""Methods, and kernels that must have run in the tests of each."""


@pytest.mark.parametrize("name", KERNELS)
def test_steps_skip_by_kernels(ops: Any, metal: Any, name: str) -> None:
    """Single steps and ragged batches equal the reference, and what is counted is what the reference counts."""
    spec = sparse_spec(name)
    tensors = sparse_tensors(spec)
    ours, judge = make_decoder(spec, tensors, ops), make_decoder(spec, tensors)
    assert np.abs(decode_logits(ours, IDS[:2]) - decode_logits(judge, IDS[:2])).max() < EXACT
    assert np.abs(batch_logits(ours, (3, 1, 9), steps=1) - batch_logits(judge, (3, 1, 9), steps=1)).max() < EXACT
    assert ran(metal, *KERNELS[name])
    counts, right = ops.counts(), judge.ops.counts()
    for kind in spec.sparsity.skips:
        mine, others = counts[kind], right[kind]
        assert (mine.calls, mine.sparse, mine.units) == (others.calls, others.sparse, others.units)
        if kind != "keys":  # of which the kernel does not say how many it kept
            assert mine.kept == others.kept
    if name in ("lte", "polar", "polar_groups"):
        saved, others = (sum(c[kind].bytes_skipped for kind in spec.sparsity.skips) for c in (counts, right))
        assert saved == others // 2  # float32 here, float64 there


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights(ops: Any, metal: Any, bits: int) -> None:
    """Codes and scales go to the kernels as they are; many tokens run whole, over the same copy."""
    spec = sparse_spec("lte")
    tensors: dict[str, Any] = dict(sparse_tensors(spec))
    for key, w in tensors.items():
        if any(part in key for part in ("gate", "up.", "down")):
            tensors[key] = quantize(w, bits, 32)
    ours, judge = make_decoder(spec, tensors, ops), make_decoder(spec, tensors)
    assert np.abs(decode_logits(ours, IDS[:1]) - decode_logits(judge, IDS[:1])).max() < EXACT
    assert np.abs(prefill_logits(ours, IDS) - prefill_logits(judge, IDS)).max() < EXACT
    assert ran(metal, "sparse_ffn_hidden")


def test_a_whole_batch_without_a_selection(ops: Any, metal: Any) -> None:
    """A dense model's ragged batch attends over pages where they lie; scores of Gemma 2 are capped."""
    spec = tiny_spec("gemma2")
    ours, judge = make_decoder(spec, tiny_tensors(spec), ops), make_decoder(spec, tiny_tensors(spec))
    assert np.abs(batch_logits(ours, (3, 1, 30), steps=1) - batch_logits(judge, (3, 1, 30), steps=1)).max() < EXACT
    assert ran(metal, "selective_attention")


def test_polar_beyond_its_table_and_prompts(ops: Any) -> None:
    """Everything selected, by kernels for a few tokens and by MLX's products for many; heads that a prompt selects."""
    from ondevice.sparsity.selection import HeadSelection

    spec = sparse_spec("polar_neurons")
    tensors = sparse_tensors(spec)
    ours, judge = make_decoder(spec, tensors, ops), make_decoder(spec, tensors)
    assert np.abs(prefill_logits(ours, IDS[:40]) - prefill_logits(judge, IDS[:40])).max() < EXACT
    assert np.abs(batch_logits(ours, (1,) * 6, steps=1) - batch_logits(judge, (1,) * 6, steps=1)).max() < EXACT
    import mlx.core as mx

    heads = ops.select_heads(mx.array(np.arange(8, dtype=np.float32).reshape(2, 4)), 2, 1)
    assert isinstance(heads, HeadSelection) and np.array(heads.index.indices).tolist() == [[2, 3]] * 2


def test_weights_without_a_kernel_say_so_once(ops: Any, caplog: pytest.LogCaptureFixture) -> None:
    spec = sparse_spec("lte")
    tensors: dict[str, Any] = dict(sparse_tensors(spec))
    for key, w in tensors.items():
        if ".down." in key:
            tensors[key] = quantize(w, 6, 32)
    with caplog.at_level(logging.WARNING, "ondevice"):
        ours = make_decoder(spec, tensors, ops)
    assert [r.getMessage().count("no Metal kernel takes its weights") for r in caplog.records] == [1]
    assert np.abs(prefill_logits(ours, IDS[:5]) - prefill_logits(make_decoder(spec, tensors), IDS[:5])).max() < EXACT


def test_forced_selections_keep_their_densities(ops: Any) -> None:
    import mlx.core as mx

    scores = mx.array(np.random.RandomState(0).standard_normal((3, 12)).astype(np.float32))
    chosen = ops.expand(ops.select_threshold(scores, 0.0), 8)
    forced = ops.forced(chosen, 0.25)
    assert np.array(forced.mask.lists(8).count).tolist() == [3, 3, 3] and forced.units == 96
    assert np.array(forced.mask.lists(1).count).tolist() == [24, 24, 24]
    with pytest.raises(ValueError, match="blocks of 8 units are selected"):
        forced.mask.lists(4)
    heads = ops.forced(ops.select_heads(scores, 2, 2), 0.5)
    assert np.array(heads.index.count).tolist() == [3, 3, 3] and heads.kept == 3
    assert np.array(ops.random_selection(scores, 12, 0.5).mask.lists(1).count).tolist() == [6, 6, 6]


def test_what_a_gpu_computes_in() -> None:
    """bfloat16 and fused activations, on the CPU. (Errors measured: 0.03; attention is peaked in these models.)"""
    pytest.importorskip("mlx.core", reason="MLX is not installed (extra `mlx-cpu`)")
    import mlx.core as mx

    from ondevice.ops.mlx import MlxOps

    for name in ("llama", "gpt2"):
        spec = tiny_spec(name)
        table = MlxOps()
        table.device = dataclasses.replace(table.device, gpu=True, dtype=mx.bfloat16)
        right = prefill_logits(make_decoder(spec, tiny_tensors(spec)), IDS)
        error = prefill_logits(make_decoder(spec, tiny_tensors(spec), table), IDS) - right
        assert 1e-4 < np.sqrt((error**2).mean()) / right.std() < 0.06, name


def test_which_table_a_machine_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core", reason="MLX is not installed (extra `mlx-cpu`)")
    from ondevice.model import op_table
    from ondevice.ops import mlx_device
    from ondevice.ops.mlx import MlxOps
    from ondevice.ops.mlx_device import find_device
    from ondevice.ops.mlx_metal import MetalOps

    monkeypatch.setattr(mlx_device, "find_device", lambda: SimpleNamespace(metal=False))
    with monkeypatch.context() as patch:
        patch.setattr("ondevice.ops.mlx.find_device", find_device)
        assert type(op_table("mlx", None, None)) is MlxOps
    monkeypatch.setattr(mlx_device, "find_device", lambda: SimpleNamespace(metal=True))
    assert type(op_table("mlx", None, None)) is MetalOps

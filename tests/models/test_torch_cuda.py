"""The table of backend cuda, its kernels interpreted, against the reference and the CPU through tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint.quantization import quantize
from ondevice.ops import torch_device
from ondevice.ops.reference import ReferenceOps
from ondevice_bench.sparsity import force, parse
from tests.kernels.triton_home import MISSING, needs_triton
from tests.models.cases import case_ids
from tests.models.running import decode_logits, make_decoder, prefill_logits
from tests.models.sparse_cases import METHODS, sparse_spec, sparse_tensors
from tests.models.sparse_running import batch_logits
from tests.tiny import ARCHITECTURES, tiny_spec, tiny_tensors

pytestmark = needs_triton
if not MISSING:
    from ondevice.ops.torch import TorchOps
    from ondevice.ops.torch_cuda import CudaOps, GroupMatrix
EXACT = 1e-4
LENGTHS = (3, 1, 9, 4, 2)
"""Short, as kernels are interpreted; prompts up to 8 tokens go token by token, the one of 9 together."""


@pytest.fixture(autouse=True)
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(torch_device.INTERPRET, "1")


def furthest(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str) -> None:
    spec = tiny_spec(architecture, n_layers=2, windows=(5, 0) if architecture in ("mistral", "gemma2") else ())
    tensors = tiny_tensors(spec)
    ours, judge = make_decoder(spec, tensors, CudaOps()), make_decoder(spec, tensors)
    assert furthest(*(batch_logits(d, LENGTHS, steps=2) for d in (ours, judge))) < EXACT


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_skip(name: str) -> None:
    """A batch of 5 and one of 1, and what is counted of them."""
    spec = sparse_spec(name)
    tensors = sparse_tensors(spec)
    ours, judge = make_decoder(spec, tensors, CudaOps()), make_decoder(spec, tensors)
    assert furthest(*(batch_logits(d, LENGTHS, steps=1) for d in (ours, judge))) < EXACT
    assert furthest(*(batch_logits(d, (3,), steps=1) for d in (ours, judge))) < EXACT
    counts, right = ours.ops.counts(), judge.ops.counts()
    for kind in spec.sparsity.skips:
        mine, others = counts[kind], right[kind]
        assert (mine.calls, mine.sparse) == (others.calls, others.sparse)
        if kind != "keys":
            assert mine.units == others.units and abs(mine.kept - others.kept) <= 0.002 * mine.units
            assert mine.bytes_skipped <= others.bytes_skipped


def test_bytes_that_single_tokens_skip() -> None:
    """Of those the host knows all, as the reference does, which counts 8 bytes where we have 4."""
    for name in ("lte", "polar_neurons", "teal"):
        spec = sparse_spec(name)
        tensors = sparse_tensors(spec)
        ours, judge = make_decoder(spec, tensors, CudaOps()), make_decoder(spec, tensors)
        for decoder in (ours, judge):
            decode_logits(decoder, case_ids("llama1")[:3])
        kind = spec.sparsity.skips[0]
        mine, others = (decoder.ops.counts()[kind].bytes_skipped for decoder in (ours, judge))
        assert mine > 0 and abs(2 * mine - others) <= 0.01 * others


@pytest.mark.parametrize("name", ["polar", "polar_groups"])
def test_forced_heads_and_neurons(name: str) -> None:
    """What a benchmark puts in the selectors' place has the density that was asked for."""
    spec = sparse_spec(name)
    for ops in (CudaOps(), TorchOps(), ReferenceOps()):
        decoder = make_decoder(spec, sparse_tensors(spec), ops)
        force(decoder, parse("polar:heads=0.25,rows=0.25" if name == "polar" else "polar:heads=0.5"))
        batch_logits(decoder, (3, 1), steps=1)
        for kind, wanted in (("heads", 0.25), ("ffn", 0.25)) if name == "polar" else (("heads", 0.5),):
            tally = ops.counts()[kind]
            assert tally.units and tally.kept / tally.units == pytest.approx(wanted, abs=0.01), (ops.name, kind)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_groups_stay_in_groups(bits: int, group: int) -> None:
    spec = tiny_spec("qwen2", d_ff=128, n_layers=1)
    tensors = {k: quantize(w, bits, group) if w.ndim == 2 else w for k, w in tiny_tensors(spec).items()}
    ours, judge = make_decoder(spec, tensors, CudaOps()), make_decoder(spec, tensors)
    assert isinstance(ours.embed, GroupMatrix)
    assert ours.embed.packed.weight.nbytes == tensors["embed.weight"].packed.nbytes
    assert furthest(*(batch_logits(d, LENGTHS[:3], steps=1) for d in (ours, judge))) < EXACT


def test_groups_of_a_sparse_ffn() -> None:
    spec = sparse_spec("lte")
    tensors: dict[str, Any] = dict(sparse_tensors(spec))
    for key, w in tensors.items():
        if w.ndim == 2 and "router" not in key:
            tensors[key] = quantize(w, 4, 32)
    ours, judge = make_decoder(spec, tensors, CudaOps()), make_decoder(spec, tensors)
    assert furthest(*(batch_logits(d, (9, 2), steps=1) for d in (ours, judge))) < EXACT


def test_other_formats_become_floats_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    spec = tiny_spec("llama", d_ff=128, n_layers=1)
    tensors = {k: quantize(w, 6, 32) if k.endswith("up.weight") else w for k, w in tiny_tensors(spec).items()}
    ours, judge = make_decoder(spec, tensors, CudaOps()), make_decoder(spec, tensors)
    ours.ops.prepare(spec)
    assert "not 6 bits in groups of 32: 1 matrices run as floats" in caplog.text
    ids = case_ids("llama1")[:9]
    assert furthest(prefill_logits(ours, ids), prefill_logits(judge, ids)) < EXACT


def test_the_command_line_equals_the_cpu(tiny_path: Any) -> None:
    """In a process of its own, as a user starts it."""
    answers = []
    for backend, switch in (("cuda", "1"), ("cpu", "")):
        environment = {**os.environ, torch_device.INTERPRET: switch}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "ondevice", "generate", str(tiny_path), "-p", "Hello there", "--json",
                   "--max-tokens", "6", "--temp", "0", "--backend", backend]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        answers.append([answer["tokens"] for answer in json.loads(done.stdout)])
    assert answers[0] == answers[1]

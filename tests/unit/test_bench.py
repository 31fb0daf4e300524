"""The benchmark: its tests' names, random weights, counted bytes and rows."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from ondevice.checkpoint.quantization import Quantized, dequantize
from ondevice.cli import cli
from ondevice.decoder import Decoder
from ondevice.errors import OptionError
from ondevice.model import load
from ondevice.ops.reference import ReferenceOps
from ondevice_bench import random_weights
from ondevice_bench.cases import Case, check, grid, parse
from ondevice_bench.measure import in_turn, measure
from ondevice_bench.parts import Profile
from ondevice_bench.random_weights import RandomWeights
from ondevice_bench.shapes import SHAPES, shape_spec
from ondevice_bench.traffic import bits_per_weight, bytes_per_token, model_bytes

KEYS = {
    *("test", "depth", "batch", "backend", "threads", "model", "sparsity", "avg_ts", "stddev_ts", "samples_ts"),
    *("bytes_per_token", "achieved_gbs", "ffn_density", "head_density", "median_ts", "bits_per_weight", "read_gbs"),
}
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma-3-1b": 999_885_952,
    "gemma-2-2b": 2_614_341_888,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-7b": 6_738_415_616,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
}
"""As published with the models."""


GEMMA = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96, "num_hidden_layers": 3, "sliding_window": 8}
GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window_pattern": 3}


def tiny_shape(name):
    """A shape with the features of the model and none of its size."""
    small = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96, "num_hidden_layers": 7, "sliding_window": 8}
    return shape_spec(name, **small, num_attention_heads=4, num_key_value_heads=2, head_dim=32)


@pytest.fixture
def command(monkeypatch, tiny_path):
    """Runs `ondevice bench` on short tests, without measuring the memory."""
    monkeypatch.setattr("ondevice.machine.read_bandwidth", lambda threads: 10e9)

    def run(*args, model=tiny_path):
        short = () if "-p" in args or "-n" in args else ("-p", 6, "-n", 4)
        given = [*([model] if model else []), *args, *short, "--backend", "reference", "-r", 2]
        return CliRunner().invoke(cli, ["bench", *map(str, given)])

    return run


def test_names_and_order_of_tests():
    names = [case.name for case in grid([512, 16], [128], [0, 4096], [1, 32])]
    assert names[:3] == ["pp512", "pp16", "tg128"]
    assert names[5] == "tg128 b32" and names[8] == "tg128 @ d4096" and names[11] == "tg128 @ d4096 b32"
    assert [c.name for c in parse(",".join(names))] == names
    assert parse("tg8@d16b4, pp3") == [Case("tg", 8, 16, 4), Case("pp", 3)]


@pytest.mark.parametrize("name", ["", "tg", "tg0", "pp4 b0", "xx5", "tg128 d5", "tg-1", "tg5,,tg6", "tg99999999999"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(OptionError, match="test"):
        parse(name)


def test_a_test_must_fit_the_context():
    spec = tiny_shape("llama-2-7b")
    check([Case("tg", 96, 4000)], spec, "it")
    with pytest.raises(OptionError, match=r"tg97 @ d4000 needs 4097 positions; it has a context of 4096; lower -n 97"):
        check([Case("tg", 97, 4000)], spec, "it")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name):
    assert sum(map(math.prod, shape_spec(name).tensors().values())) == PARAMETERS[name]


def test_an_unknown_shape_is_refused():
    with pytest.raises(OptionError, match=r"'llama-9' is not known; known are smollm2-135m"):
        shape_spec("llama-9")


@pytest.mark.parametrize("name", SHAPES)
def test_random_weights_give_finite_logits_of_a_sane_size(name):
    decoder = Decoder(RandomWeights(tiny_shape(name)), ReferenceOps())
    (logits,) = decoder.prefill(list(range(40)), decoder.new_cache(1, 64), all_logits=True)
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 30


@pytest.mark.parametrize("bits", [4, 5, 6, 8, 16])
def test_random_weights_keep_the_variance_and_repeat(bits):
    weights = RandomWeights(shape_spec("smollm2-135m"), bits, 64)
    up, gate = weights.tensor("layers.3.up.weight"), weights.tensor("layers.3.gate.weight")
    values = dequantize(up)
    assert values.shape == (1536, 576)
    assert 0.5 < values.std() * math.sqrt(576) < 1.5 and abs(values.mean()) < 0.2 * values.std()
    assert np.array_equal(values, dequantize(weights.tensor("layers.3.up.weight")))
    assert not np.array_equal(values, dequantize(gate))
    if bits != 16:
        assert isinstance(up, Quantized) and up.biases is None and up.scales.dtype == np.float16


def test_random_weights_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(OptionError, match=r"group size 128 does not divide .*576.*choose from 32, 64"):
        RandomWeights(shape_spec("smollm2-135m"), 4, 128)
    with pytest.raises(OptionError, match="bits is 3; choose one of 4, 5"):
        RandomWeights(shape_spec("smollm2-135m"), 3)
    monkeypatch.setattr(random_weights, "memory_bytes", lambda: (8 << 30, 3 << 30))
    with pytest.raises(OptionError, match=r"3\.8 GB at 4 bits and 3\.2 GB are available"):
        RandomWeights(shape_spec("llama-2-7b"))


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_token_are_the_weights_and_visible_keys(tied):
    spec = shape_spec("gemma-3-1b", **{**GEMMA, "tie_word_embeddings": tied})
    decoder = Decoder(RandomWeights(spec), ReferenceOps())
    sizes = {name: 8 * math.prod(shape) for name, shape in spec.tensors().items()}  # float64
    layers = sum(size for name, size in sizes.items() if name.startswith("layers."))
    table = 8 * 96 * 64
    head, row = table + 8 * 64, 0 if tied else 8 * 64
    biases = model_bytes(decoder) - sum(sizes.values())  # the reference table keeps zeros where there are none
    assert 0 < biases < 0.05 * model_bytes(decoder)
    assert bits_per_weight(decoder) == pytest.approx(64, rel=0.05)
    position = 2 * 2 * 32 * 8  # keys and values of 2 heads of 32 in a layer
    cache = decoder.new_cache(4, 20)
    # After 9: 10 and 11 positions in the layer that sees all, 8 in each of 2 that slide.
    decode = bytes_per_token(decoder, cache, Case("tg", 2, 9, 4))
    assert decode == pytest.approx((layers + head + biases) / 4 + row + position * (10.5 + 16), abs=100)
    # The last of 6 tokens after 9 sees 15; the first one still sees what slides out before: 8 + 5.
    prompt = bytes_per_token(decoder, cache, Case("pp", 6, 9, 4))
    assert prompt == pytest.approx((layers + head + biases + position * (15 + 26)) / 6 + row, abs=100)


def test_a_prompt_reads_the_layers_once_for_each_512_tokens():
    decoder = Decoder(RandomWeights(tiny_shape("llama-2-7b")), ReferenceOps())
    cache = decoder.new_cache(1, 1100)
    one, three = (bytes_per_token(decoder, cache, Case("pp", n)) * n for n in (512, 1025))
    layers = model_bytes(decoder) - 2 * 8 * 96 * 64
    assert three - one == pytest.approx(2 * layers + 513 * 512 + 7 * 1024 * (1024 + 1025), rel=0.01)


def test_measuring_times_each_repetition_but_not_what_lies_between(tiny):
    started = time.perf_counter()
    result = measure(tiny.decoder, Case("tg", 3, 5, 2), 2, between=lambda: time.sleep(0.05))
    assert time.perf_counter() - started > 3 * 3 * 0.05
    assert len(result.samples) == 2 and min(result.samples) > 2 / 0.05


@pytest.mark.parametrize(
    ("case", "calls", "rate"), [(Case("tg", 3, 5, 2), [2] * 9, 2.0), (Case("pp", 7, 5, 2), [7] * 6, 7.0)]
)
def test_what_is_run(tiny, monkeypatch, case, calls, rate):
    """One repetition to warm up and two timed ones, from the same depth each time; each step takes a second."""
    clock = SimpleNamespace(perf_counter=count().__next__)
    monkeypatch.setattr("ondevice_bench.measure.time", clock)
    steps = []
    run = tiny.decoder.ops.run
    monkeypatch.setattr(tiny.decoder.ops, "run", lambda step, *rest: steps.append(step) or run(step, *rest))
    assert measure(tiny.decoder, case, 2).samples == [rate, rate]
    assert [list(step.tokens.shape) for step in steps[:2]] == [[5], [5]]  # the depth of each sequence
    assert [len(step.tokens) for step in steps[2:]] == calls
    assert {int(step.positions.max()) for step in steps[2:]} <= set(range(case.depth, case.positions))
    assert int(steps[-1].positions.max()) == case.positions - 1


@pytest.mark.parametrize("backend", ["reference", "cpu", "torch", "mlx"])
def test_sequences_with_the_same_context_have_it_in_memory_of_their_own(tiny_path, monkeypatch, backend):
    needs = {"torch": "torch", "mlx": "mlx.core"}.get(backend)
    if needs is not None:
        pytest.importorskip(needs, reason=f"{needs} is not installed")
    tiny, runs = load(tiny_path, backend=backend), []
    monkeypatch.setattr("ondevice_bench.measure._Run.once", lambda run, between: runs.append(run) or 1.0)
    in_turn([tiny.decoder], Case("tg", 3, 70, 3), 1, alike=True)
    cache, decoder = runs[0].cache, tiny.decoder
    assert np.unique(cache.block_table).size == cache.block_table.size == 6
    logits = decoder.decode([5, 5, 5], cache, range(3))
    np.testing.assert_allclose(logits[1:], logits[:2], rtol=0, atol=1e-5)
    alone = decoder.new_cache(1, 73)
    list(decoder.prefill(runs[0].tokens[0][:70], alone))
    np.testing.assert_allclose(logits[:1], decoder.decode([5], alone, [0]), rtol=0, atol=1e-5)


def test_keys_and_values_beyond_memory_are_refused(tiny, monkeypatch):
    monkeypatch.setattr("ondevice_bench.measure.memory_bytes", lambda: (1 << 20, 1 << 10))
    with pytest.raises(OptionError, match=r"tg3 b2: keys and values take .* lower -b or -d"):
        measure(tiny.decoder, Case("tg", 3, 0, 2), 1)


def test_json_has_the_contracts_keys_and_honest_numbers(command, tiny_path):
    rows = json.loads(command("-d", "0,10", "-b", 1, "-b", 2, "--json").stdout)
    assert [row["test"] for row in rows][:4] == ["pp6", "tg4", "pp6 b2", "tg4 b2"]
    assert rows[-1]["test"] == "tg4 @ d10 b2" and rows[-1]["depth"] == 10 and rows[-1]["batch"] == 2
    for row in rows:
        assert row.keys() >= KEYS and len(row["samples_ts"]) == 2
        assert row["avg_ts"] == pytest.approx(np.mean(row["samples_ts"]))
        assert row["stddev_ts"] == pytest.approx(np.std(row["samples_ts"], ddof=1))
        assert row["achieved_gbs"] == pytest.approx(row["avg_ts"] * row["bytes_per_token"] / 1e9, rel=1e-3)
        assert row["read_share"] == pytest.approx(row["achieved_gbs"] / 10)
        assert row["sparsity"] == "dense" and row["backend"] == "reference" and row["model"] == tiny_path.name
    assert rows[-1]["bytes_per_token"] < rows[-3]["bytes_per_token"]  # weights shared by two sequences


def test_tables_and_csv(command):
    lines = command("--only", "tg").stdout.splitlines()
    assert lines[0].startswith("| model") and len({len(line) for line in lines[:3]}) == 1
    assert "| tg4  |" in lines[2] and " ± " in lines[2] and len(lines) == 5
    assert lines[4].startswith("memory as measured here: 10.0 GB/s read by all threads; reached: tg4 ")
    (row,) = csv.DictReader(io.StringIO(command("--only", "pp", "-o", "csv").stdout))
    assert row["test"] == "pp6" and float(row["avg_ts"]) > 0 and "samples_ts" not in row


def test_one_repetition_has_no_deviation(command, tiny_path):
    args = ["bench", str(tiny_path), "-p", "4", "-n", "2", "-r", "1", "--backend", "reference"]
    assert " ± " not in CliRunner().invoke(cli, args).stdout
    assert json.loads(CliRunner().invoke(cli, [*args, "--json"]).stdout)[0]["stddev_ts"] is None


def test_a_shape_needs_no_file(command, monkeypatch):
    spec = tiny_shape("qwen2.5-0.5b")
    monkeypatch.setattr("ondevice_bench.loading.shape_spec", lambda name: spec)
    monkeypatch.setenv("ONDEVICE_MODEL", "not-this-one")
    (row,) = json.loads(command("--shape", "qwen2.5-0.5b", "--bits", 8, "--only", "tg", "--json", model=None).stdout)
    assert row["model"] == "qwen2.5-0.5b shape, random 8-bit g32"


def test_what_skips_is_compared_with_what_has_the_same_head(command, monkeypatch):
    small = {"hidden_size": 128, "intermediate_size": 96, "vocab_size": 96, "num_hidden_layers": 1}
    spec = shape_spec("smollm2-135m", **small, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    monkeypatch.setattr("ondevice_bench.loading.shape_spec", lambda name: spec)
    args = ["bench", "--shape", "smollm2-135m", "--only", "tg", "-n", "2", "-r", "2", "--sparsity", "lte", "--json"]
    whole, skipping = json.loads(CliRunner().invoke(cli, args).stdout)
    assert (whole["speedup"], skipping["sparsity"]) == (None, "lte")
    rows = json.loads(CliRunner().invoke(cli, [*args, "--sketch-head"]).stdout)
    assert [row["sparsity"] for row in rows] == ["dense", "sketch-head", "lte+sketch-head"]
    assert rows[1]["speedup"] == rows[1]["median_ts"] / rows[0]["median_ts"]
    assert rows[2]["speedup"] == rows[2]["median_ts"] / rows[1]["median_ts"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-n", "0"), "0 is not possible; give 1 or more; --only pp leaves these tests out"),
        (("-p", "5,0"), "--only tg"),
        (("-p", "5,,6"), "'' is no whole number"),
        (("-n", "many"), "'many' is no whole number"),
        (("-d", "-1"), "-1 is not possible; give 0 or more"),
        (("-b", "0"), "0 is not possible"),
        (("-t", "0"), "0 is not possible"),
        (("-n", "4", "-p", "4", "-d", "125"), "pp4 @ d125 needs 129 positions"),
        (("--shape", "smollm2-135m"), "contradict each other"),
        (("--bits", "8"), "--bits 8 is of random weights, which --shape asks for"),
        (("-o", "csv", "--json"), "--json and -o csv contradict"),
        (("--profile",), "the reference backend keeps no account of its parts; take --backend cpu"),
        (("--profile", "--only", "pp"), "--only pp leaves out"),
        (("--sparsity", "polar"), "makes random routers, for the weights of --shape"),
    ],
)
def test_bad_values_are_refused_by_name(command, args, message):
    result = command(*args)
    assert result.exit_code in (1, 2) and message in " ".join(result.stderr.split()), result.output
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--shape", "llama-9"), "'llama-9' is not known"),
        (("--shape", "smollm2-135m", "--bits", "16", "--group-size", "64"), "16 bits have no groups"),
        (("--shape", "smollm2-135m", "--group-size", "128"), "choose from 32, 64"),
    ],
)
def test_bad_shapes_are_refused(command, args, message):
    result = command(*args, model=None)
    assert result.exit_code in (1, 2) and message in result.stderr


PARTS = {
    "ffn": SimpleNamespace(busy=3.0, waiting=0.5, steps=100, bytes=10**9),
    "attention": SimpleNamespace(busy=1.0, waiting=0.5, steps=100, bytes=0),
}


def test_a_profile_accounts_for_all_time():
    rows = {row["part"]: row for row in Profile(PARTS, seconds=6.0, steps=50, batch=2).rows()}
    assert list(rows) == ["ffn", "attention", "waiting", "other"]
    assert rows["ffn"]["us_per_token"] == pytest.approx(30_000) and rows["ffn"]["gbs"] == pytest.approx(100 / 3)
    assert rows["attention"]["gbs"] is None and rows["waiting"]["share"] == pytest.approx(1 / 6)
    assert rows["other"]["us_per_token"] == pytest.approx(10_000)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_profiles_are_printed_for_generation_only(command, monkeypatch):
    calls = []

    @contextmanager
    def profiled(self):
        calls.append(self)
        yield PARTS

    monkeypatch.setattr(ReferenceOps, "profiled", profiled, raising=False)
    out = command("--profile").stdout
    assert len(calls) == 1 and "| ffn " in out and "| waiting " in out and "µs/token" in out
    pp, tg = json.loads(command("--profile", "--json").stdout)
    assert pp["profile"] is None and [row["part"] for row in tg["profile"]][:2] == ["ffn", "attention"]

"""Packed weights on disk: the same logits without reading the model, as long as it is the same model."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import time
from collections import namedtuple

import numpy as np
import pytest
from click.testing import CliRunner

import ondevice
from ondevice.checkpoint import tile_files
from ondevice.checkpoint.quantization import quantize
from ondevice.cli import cli
from ondevice.ops import cpu_tile_cache
from ondevice.ops.cpu import CpuOps
from tests.conftest import VOCAB
from tests.packed import decoder_of, kept, logits, matrices
from tests.tiny import tiny_checkpoint, tiny_gguf, tiny_spec, tiny_tensors

pytestmark = pytest.mark.usefixtures("folder")


def check(path, folder, read, threads=1):
    """Packs, then loads from the cache. Returns the second decoder."""
    fresh = logits(decoder_of(path, threads))
    (file,) = kept(folder)
    changed = file.stat().st_mtime_ns
    assert matrices(read)
    read.clear()
    again = decoder_of(path, threads)
    np.testing.assert_array_equal(logits(again), fresh)
    assert read and not matrices(read)
    assert kept(folder) == [file] and file.stat().st_mtime_ns == changed
    return again


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma2", "phi3"])
def test_a_second_load_gives_equal_logits_and_reads_no_matrix(tmp_path, folder, read, architecture):
    """Biases (qwen2, gpt2), tied heads (all but llama and phi3), learned positions (gpt2), fused tensors (phi3)."""
    path = tiny_checkpoint(tmp_path / "model", tiny_spec(architecture))
    again = check(path, folder, read)
    if again.spec.tied_head:
        assert again.embed.data is again.head[0].data


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_kind_of_gguf(tmp_path, folder, read, kind):
    check(tiny_gguf(tmp_path / "model.gguf", types=kind), folder, read)


@pytest.mark.parametrize(("kind", "block_bytes", "factors"), [("Q4_K", 144, 0), ("Q5_K", 176, 0), ("Q6_K", 210, 208)])
def test_every_kind_with_scales_in_bytes(tmp_path, folder, read, monkeypatch, kind, block_bytes, factors):
    random = np.random.RandomState(1)

    def blocks(w, _):
        if w.ndim == 1:
            return w
        made = random.randint(0, 256, (w.shape[0], w.shape[1] // 256, block_bytes)).astype(np.uint8)
        made[..., factors : factors + 2] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        if kind != "Q6_K":
            made[..., 2:4] = made[..., :2]
        return made.reshape(len(w), -1)

    monkeypatch.setattr("gguf.quants.quantize", blocks)
    spec = tiny_spec(d_model=256, d_ff=256, head_dim=64)
    tensors = tiny_tensors(spec)
    types = {name: kind for name, w in tensors.items() if w.ndim == 2}
    check(tiny_gguf(tmp_path / "model.gguf", spec, tensors, types), folder, read)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (5, 64), (6, 32), (8, 64)])
def test_every_kind_of_affine_groups(tmp_path, folder, read, bits, group_size):
    spec = tiny_spec(d_ff=128)
    tensors = {n: quantize(w, bits, group_size) if w.ndim == 2 else w for n, w in tiny_tensors(spec).items()}
    check(tiny_checkpoint(tmp_path / "model", spec, tensors), folder, read)


def test_runs_of_different_formats_and_pieces_for_several_readers(tmp_path, folder, read, monkeypatch):
    monkeypatch.setattr(cpu_tile_cache, "PIECE", 1000)
    spec = tiny_spec()
    tensors = tiny_tensors(spec)
    tensors["layers.1.k.weight"] = quantize(tensors["layers.1.k.weight"], 4, 32)
    again = check(tiny_checkpoint(tmp_path / "model", spec, tensors), folder, read, threads=2)
    assert len(again.layers[1].qkv.linear.weight) == 3


def test_a_changed_model_is_packed_again(model, folder, read):
    before = logits(decoder_of(model))
    (weights,) = model.glob("*.safetensors")
    shutil.copy(weights, model / "copy")
    read.clear()
    os.utime(weights, ns=(1, 1))
    np.testing.assert_array_equal(logits(decoder_of(model)), before)
    assert matrices(read) and len(kept(folder)) == 1  # the old one is gone

    tensors = tiny_tensors(tiny_spec(vocab_size=VOCAB), seed=1)
    shutil.rmtree(model)
    tiny_checkpoint(model, tiny_spec(vocab_size=VOCAB), tensors)
    assert not np.array_equal(logits(decoder_of(model)), before)
    read.clear()
    config = model / "config.json"
    config.write_text(config.read_text() + " ")
    decoder_of(model)
    assert matrices(read) and len(kept(folder)) == 1


@pytest.mark.parametrize("name", ["_SOURCES", "instruction_set"])
def test_tiles_of_another_version_or_processor_are_not_used(model, folder, read, monkeypatch, name):
    decoder_of(model)
    read.clear()
    monkeypatch.setattr(cpu_tile_cache, name, "other" if name == "_SOURCES" else lambda: "other")
    decoder_of(model)
    assert matrices(read) and len(kept(folder)) == (1 if name == "_SOURCES" else 2)


def test_a_folder_that_cannot_be_made_is_said_once(model, folder, caplog):
    folder.write_text("in the way")
    for _ in range(2):
        assert np.isfinite(logits(decoder_of(model))).all()
    (record,) = caplog.records
    assert str(folder) in record.getMessage() and "ONDEVICE_NO_TILE_CACHE" in record.getMessage()


def test_a_full_disk_is_said_once_and_leaves_nothing(model, folder, caplog, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        assert np.isfinite(logits(decoder_of(model))).all()
    (record,) = caplog.records
    assert "No space left" in record.getMessage() and list(folder.iterdir()) == []


def test_nothing_is_written_without_twice_the_space(model, folder, caplog, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    decoder_of(model)
    assert kept(folder) == [] and "are free" in caplog.text


def test_small_models_are_not_kept(model, folder, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tile_files, "folder", lambda: folder)
    decoder_of(model)
    assert not folder.exists()


def test_what_no_model_needs_goes(model, folder, tmp_path, tiny_path):
    folder.mkdir()
    other = shutil.copytree(tiny_path, tmp_path / "other")
    decoder_of(other)
    (gone,) = kept(folder)
    shutil.rmtree(other)
    fresh, old, foreign = folder / ".tmp-fresh", folder / ".tmp-old", folder / "notes.txt"
    for path in (fresh, old, foreign):
        path.write_text("x")
    os.utime(old, (time.time() - 2 * tile_files.ABANDONED,) * 2)
    (folder / "damaged.safetensors").write_text("x")
    decoder_of(model)
    assert not gone.exists() and len(kept(folder)) == 1
    assert fresh.exists() and foreign.exists() and not old.exists()


def test_an_error_while_packing_keeps_nothing(model, folder, monkeypatch):
    def fails(*_):
        raise RuntimeError("half way")

    monkeypatch.setattr(CpuOps, "pack_norm", fails)
    with pytest.raises(RuntimeError, match="half way"):
        decoder_of(model)
    assert kept(folder) == []


def test_it_can_be_switched_off(model, folder, monkeypatch):
    ondevice.load(model, backend="cpu", threads=1, tile_cache=False)
    monkeypatch.setenv(tile_files.OFF, "1")
    ondevice.load(model, backend="cpu", threads=1)
    monkeypatch.delenv(tile_files.OFF)
    ondevice.load(model, backend="reference")
    options = [str(model), "-p", "Hi", "-n", "2", "-t", "1", "--backend", "cpu"]
    assert CliRunner().invoke(cli, ["generate", *options, "--no-tile-cache"]).exit_code == 0
    assert kept(folder) == []
    assert CliRunner().invoke(cli, ["generate", *options]).exit_code == 0
    assert len(kept(folder)) == 1


def test_ls_shows_rm_deletes_and_doctor_counts(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ondevice.machine.BANDWIDTH_BYTES", 1 << 22)

    def run(*args):
        result = CliRunner().invoke(cli, args)
        assert result.exit_code == 0, result.output
        return result

    parent = tmp_path / "store" / "hub" / "some"
    parent.mkdir(parents=True)
    for name in ("one", "two"):
        shutil.copytree(model, parent / name)
        if name == "one":
            decoder_of(parent / name)
    (file,) = kept(folder)
    one, two = json.loads(run("ls", "--json").stdout)
    assert one["cached"] == file.stat().st_size and two["cached"] == 0
    assert [line.endswith(" cached") for line in run("ls").stdout.splitlines()] == [True, False]
    assert json.loads(run("doctor", "--json").stdout)["tile_cache"]["bytes"] == one["cached"]
    assert str(folder) in run("doctor").stdout
    assert "of packed weights" in run("rm", "some/one", "-y").stderr and kept(folder) == []
    decoder_of(parent / "two")
    freed = run("rm", "--cache").stderr
    assert "deleted" in freed and "kB" in freed and kept(folder) == [] and (parent / "two").exists()
    assert run("rm", "--cache").stderr == "deleted 0 B of packed weights\n"
    for args in (["rm"], ["rm", "some/two", "--cache"]):
        assert CliRunner().invoke(cli, args).exit_code == 2


def _load_often(path, folder):
    tile_files.folder = lambda: folder
    cpu_tile_cache.SMALLEST = 1
    for _ in range(4):
        shutil.rmtree(folder, ignore_errors=True)
        decoder_of(path)


def test_two_processes_may_write_at_once(model, folder, read, caplog):
    before = logits(decoder_of(model))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_load_often, args=(model, folder)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    read.clear()
    np.testing.assert_array_equal(logits(decoder_of(model)), before)
    assert not caplog.records

"""What tests of the cache of packed weights share."""

from __future__ import annotations

import shutil

import pytest

from ondevice.checkpoint import tile_files
from ondevice.checkpoint.gguf_checkpoint import GgufCheckpoint
from ondevice.checkpoint.hub import HubCheckpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache of packed weights, which takes models of any size."""
    monkeypatch.delenv(tile_files.OFF)
    monkeypatch.setenv("ONDEVICE_HOME", str(tmp_path / "store"))
    monkeypatch.setattr(tile_files, "folder", lambda: tmp_path / "tiles")
    monkeypatch.setattr("ondevice.ops.cpu_tile_cache.SMALLEST", 1)
    monkeypatch.setattr("ondevice.ops.cpu_tile_cache._warned", set())
    return tmp_path / "tiles"


@pytest.fixture
def model(tiny_path, tmp_path):
    """A tiny folder of its own."""
    shutil.copytree(tiny_path, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def read(monkeypatch):
    """Names of the tensors that are read from checkpoints."""
    names = []
    for kind in (GgufCheckpoint, HubCheckpoint):
        original = kind.tensor
        monkeypatch.setattr(kind, "tensor", lambda self, name, f=original: names.append(name) or f(self, name))
    return names

"""Decoders whose packed weights may be kept, for tests of that."""

from __future__ import annotations

import numpy as np

from ondevice.checkpoint import open_checkpoint
from ondevice.decoder import Decoder
from ondevice.ops.cpu import CpuOps


def decoder_of(path, threads=1):
    ops = CpuOps(threads)
    with open_checkpoint(path) as checkpoint, ops.keeping(checkpoint):
        return Decoder(checkpoint, ops)


def logits(decoder):
    cache = decoder.new_cache(1, 16)
    (first,) = decoder.prefill([3, 5, 7, 9], cache, all_logits=True)
    return np.concatenate([first, decoder.decode([4], cache, [0])])


def matrices(names):
    return [name for name in names if "norm" not in name]


def kept(folder):
    return sorted(folder.glob("*.safetensors"))

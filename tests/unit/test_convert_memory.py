"""What rounding and writing a model takes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from tests.tiny import tiny_checkpoint, tiny_spec

SHARD = 4 << 20
RUN = """
import json, sys
from functools import partial
from pathlib import Path
from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.writer import write_checkpoint
from ondevice_convert import rounding
from ondevice_convert.recipe import make_recipe
from ondevice_convert.requantized import Requantized

rounding.rows_of.__defaults__ = (1 << 15,)  # as small beside this model as it is beside a real one


def convert(source, folder, bits):
    with open_checkpoint(source) as checkpoint:
        made = Requantized(checkpoint, make_recipe(checkpoint, bits).forms)
        tensors = ((name, partial(made.tensor, name)) for name in made.spec.tensors())
        write_checkpoint(folder, made.spec, tensors, max_shard_bytes=int(sys.argv[3]), job="a", release=made.release)


def most():
    # of this program; getrusage would count what started it too
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


small, large = Path(sys.argv[1]), Path(sys.argv[2])
for bits in (None, 4):  # what all conversions need, however small
    convert(small, small / f"as {bits}", bits)
found = [most()]
for bits in (4, None):
    convert(large, large / f"as {bits}", bits)
    found.append(most())
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the largest memory is read from /proc")
def test_memory_stays_below_two_layers_and_a_file(tmp_path):
    spec = tiny_spec(n_layers=10, d_model=512, d_ff=1024, n_heads=8, n_kv_heads=8, head_dim=64)
    small, large = tmp_path / "small", tmp_path / "large"
    tiny_checkpoint(small, tiny_spec(d_ff=128), dtype=np.float16)
    ones = {name: np.ones(shape, np.float16) for name, shape in spec.tensors().items()}
    tiny_checkpoint(large, spec, ones, np.float16)
    shapes = spec.tensors().items()
    layer = sum(2 * prod(shape) for name, shape in shapes if name.startswith("layers.0."))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(small), str(large), str(SHARD)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    base, rounded, kept = json.loads(done.stdout)
    with open_checkpoint(large) as checkpoint:
        assert checkpoint.nbytes > 3 * (2 * layer + SHARD)
    assert rounded - base < 2 * layer + SHARD and kept - base < 2 * layer + SHARD, (base, rounded, kept, layer)
    print(base, rounded, kept, layer)

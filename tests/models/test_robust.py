"""Models on the CPU among threads, forks, deletion and Ctrl+C."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

import ondevice
from tests.conftest import VOCAB, write_tokenizer
from tests.tiny import tiny_checkpoint, tiny_spec

SETTINGS = {"max_tokens": 40, "temperature": 0.8, "seed": 3, "ignore_eos": True}
PROMPTS = ["Hello there", "Why is the sky blue?", "The quick brown fox", "dog " * 20]


@pytest.fixture(scope="module")
def another_cpu(tmp_path_factory):
    """A second tiny model, of other sizes than `tiny_cpu`, on the same pool of threads."""
    spec = tiny_spec("qwen2", vocab_size=VOCAB, n_layers=2, d_ff=160)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("another") / "model", spec)
    write_tokenizer(folder)
    return ondevice.load(folder, backend="cpu", threads=2)


def together(jobs):
    """Results of functions that run at the same time, each in a thread."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait()
        return [job() for _ in range(3)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads meet everywhere, not only where they wait
    try:
        with ThreadPoolExecutor(len(jobs)) as threads:
            return list(threads.map(run, jobs))
    finally:
        sys.setswitchinterval(before)


def answering(model, prompt):
    return lambda: model.generate(prompt, **SETTINGS).tokens


def test_threads_share_a_model(tiny_cpu):
    alone = [answering(tiny_cpu, prompt)() for prompt in PROMPTS]
    assert together([answering(tiny_cpu, prompt) for prompt in PROMPTS]) == [[tokens] * 3 for tokens in alone]


def test_two_models_at_once(tiny_cpu, another_cpu):
    jobs = [answering(model, prompt) for model in (tiny_cpu, another_cpu) for prompt in PROMPTS[:2]]
    alone = [job() for job in jobs]
    assert alone[0] != alone[2]
    assert together(jobs) == [[tokens] * 3 for tokens in alone]


def test_streams_of_one_model_take_turns(tiny_cpu):
    alone = ["".join(p.text for p in tiny_cpu.stream(prompt, **SETTINGS)) for prompt in PROMPTS[:2]]
    streams = [tiny_cpu.stream(prompt, **SETTINGS) for prompt in PROMPTS[:2]]
    mixed = [[], []]
    for pieces in zip(*streams):
        for texts, piece in zip(mixed, pieces):
            texts.append(piece.text)
    assert ["".join(texts) for texts in mixed] == alone


def python(code, *args, **extra):
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **extra)


FORK = """
import os, sys, ondevice
model = ondevice.load(sys.argv[1], backend="cpu", threads=2)
ask = lambda: model.generate("Hello there", max_tokens=20, temperature=0, ignore_eos=True).tokens
before = ask()
child = os.fork()
same = all(ask() == before for _ in range(3))
if not child:
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
print(same, os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_parent_and_child_generate_after_a_fork(tiny_path, tiny_cpu):
    out, err = python(FORK, tiny_path).communicate(timeout=60)
    assert out == "True 0\n", err


def test_a_deleted_model_is_gone(tiny_path):
    model = ondevice.load(tiny_path, backend="cpu", threads=2)
    expected = "".join(p.text for p in model.stream("Hello there", **SETTINGS))
    gone = [weakref.ref(x) for x in (model, model.decoder, model.decoder.ops, model.decoder.embed.data)]
    stream = model.stream("Hello there", **SETTINGS)
    text = next(stream).text
    del model
    gc.collect()
    text += "".join(p.text for p in stream)
    assert text == expected, "a stream goes on without its model"
    del stream
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


LOAD_AND_DROP = """
import gc, resource, sys, ondevice
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
sizes = []
for i in range(6):
    model = ondevice.load(sys.argv[1], backend="cpu", threads=2)
    model.generate("Hello there", max_tokens=3)
    del model
    gc.collect()
    sizes.append(rss())
print(max(sizes[2:]) - sizes[1])
"""


@pytest.fixture(scope="module")
def larger_path(tmp_path_factory):
    """A random model of 22 MB with much attention."""
    sizes = {"n_layers": 32, "d_model": 128, "n_heads": 4, "n_kv_heads": 1, "head_dim": 64, "d_ff": 256}
    spec = tiny_spec(vocab_size=VOCAB, context_length=16384, **sizes)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("larger") / "model", spec)
    write_tokenizer(folder, template=None)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_deleted_models_is_given_back(larger_path):
    out, err = python(LOAD_AND_DROP, larger_path).communicate(timeout=100)
    assert out, err
    assert int(out) < 20e6, "less than one model more after four more models"


INTERRUPTED = """
import signal, sys, time, ondevice
signal.signal(2, signal.default_int_handler)  # a shell that runs the tests in the background has switched it off
model = ondevice.load(sys.argv[1], backend="cpu", threads=2)
cache = model.decoder.new_cache(1, 16384)
cache.reserve(0, 16384)
cache.lengths[0] = 12000  # as if so much had been read: a step takes seconds from here on
ask = lambda: model.generate("Hello there", max_tokens=4, temperature=0).tokens
before = ask()
print("reading", flush=True)
try:
    for _ in model.decoder.prefill([5] * 4000, cache):
        pass
    print("not interrupted")
except KeyboardInterrupt:
    print(time.monotonic())
print(ask() == before)
"""


@pytest.mark.parametrize("delay", [0.3, 1.0])
def test_ctrl_c_is_heard_in_a_long_prompt(larger_path, delay):
    process = python(INTERRUPTED, larger_path)
    assert process.stdout.readline() == "reading\n"
    time.sleep(delay)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    heard, usable = out.splitlines()
    assert float(heard) - sent < 0.5, err
    assert usable == "True", err

"""Times llama.cpp on one GGUF file. Run by the Python that has llama-cpp-python, so it imports nothing of ours.

Prints one JSON object: {"samples": {test: [tok/s, ...]}, "bytes": of weights, "parameters": count, "version": ...}.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from functools import partial
from importlib import metadata

import llama_cpp as llama
import numpy as np

CHUNK = 512
"""Tokens of one physical batch, llama.cpp's default."""


class Run:
    """A context of llama.cpp for one test.

    Args:
        model: handle.
        case: kind, tokens, depth and batch of the test.
        options: of the command line.
    """

    def __init__(
        self, model: llama.llama_model_p, case: tuple[str, int, int, int], options: argparse.Namespace
    ) -> None:
        self.kind, self.tokens, self.depth, self.batch = case
        length = -(-(self.depth + self.tokens) // 256) * 256
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * self.batch, self.batch
        params.n_batch = params.n_ubatch = max(CHUNK, self.batch)
        params.n_threads = params.n_threads_batch = options.threads
        _set(params, "flash_attn_type", int(options.flash == "on"))
        params.kv_unified = False
        self.context = llama.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit(f"{options.model}: llama.cpp makes no context of {params.n_ctx} tokens with these options")
        self.memory = llama.llama_get_memory(self.context)
        vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        shape = (self.batch, self.depth + self.tokens)
        self.ids = np.random.default_rng(0).integers(0, vocabulary, shape).tolist()
        self.slots = llama.llama_batch_init(params.n_batch, 0, 1)
        for sequence in range(self.batch):
            self.read(sequence, 0, self.depth)

    def close(self) -> None:
        """Frees the context."""
        llama.llama_batch_free(self.slots)
        llama.llama_free(self.context)

    def step(self, entries: list[tuple[int, int, int]], wanted: int) -> None:
        """One pass.

        Args:
            entries: token, position and sequence of each row.
            wanted: how many rows, counted from the end, get logits.
        """
        slots = self.slots
        slots.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            slots.token[i], slots.pos[i] = token, position
            slots.n_seq_id[i], slots.seq_id[i][0] = 1, sequence
            slots.logits[i] = i >= len(entries) - wanted
        if llama.llama_decode(self.context, slots) != 0:
            raise SystemExit("llama_decode failed: too little memory, or too long a context")

    def read(self, sequence: int, first: int, end: int) -> None:
        """Reads a sequence's tokens from `first` to `end`."""
        for start in range(first, end, CHUNK):
            stop = min(start + CHUNK, end)
            ids = self.ids[sequence]
            self.step([(ids[p], p, sequence) for p in range(start, stop)], wanted=int(stop == end))
        llama.llama_synchronize(self.context)

    def decode(self, position: int) -> None:
        """One token more for each sequence."""
        self.step([(ids[position], position, i) for i, ids in enumerate(self.ids)], wanted=self.batch)
        llama.llama_synchronize(self.context)

    def once(self, cold: np.ndarray | None) -> float:
        """Tokens per second of one repetition. cold: memory to read before each step, so that the cache holds it."""
        for sequence in range(self.batch):
            llama.llama_memory_seq_rm(self.memory, sequence, self.depth, -1)
        end = self.depth + self.tokens
        if self.kind == "pp":
            steps = [partial(self.read, sequence, self.depth, end) for sequence in range(self.batch)]
        else:
            steps = [partial(self.decode, position) for position in range(self.depth, end)]
        seconds = 0.0
        for step in steps:
            if cold is not None:
                cold.max()
            start = time.perf_counter()
            step()
            seconds += time.perf_counter() - start
        return self.tokens * self.batch / seconds


def _set(params: ctypes.Structure, name: str, value: int) -> None:
    """Sets a field; one that the library does not have would be taken without effect."""
    if not hasattr(params, name):
        raise SystemExit(f"this llama-cpp-python has no {name}; install 0.3.36 or newer")
    setattr(params, name, value)


def main() -> None:
    """Runs the tests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tests", required=True, help="JSON: [[kind, tokens, depth, batch, name], ...]")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repetitions", type=int, required=True)
    parser.add_argument("--flash", choices=["on", "off"], default="on")
    parser.add_argument("--repack", choices=["on", "off"], default="on")
    parser.add_argument("--cold", type=int, default=0, help="bytes to read between steps")
    options = parser.parse_args()
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    _set(params, "use_extra_bufts", options.repack == "on")
    model = llama.llama_model_load_from_file(options.model.encode(), params)
    if not model:
        raise SystemExit(f"{options.model}: llama.cpp does not load it")
    cold = np.ones(options.cold // 8, np.int64) if options.cold else None
    samples = {}
    for *case, name in json.loads(options.tests):
        run = Run(model, tuple(case), options)
        run.once(cold)
        samples[name] = [run.once(cold) for _ in range(options.repetitions)]
        run.close()
    size, parameters = llama.llama_model_size(model), llama.llama_model_n_params(model)
    version = f"llama-cpp-python {metadata.version('llama-cpp-python')}"
    print(json.dumps({"samples": samples, "bytes": size, "parameters": parameters, "version": version}))


if __name__ == "__main__":
    main()

"""Times `ondevice` on one model, in a process of its own, with the options and the answer of `run_llama`."""

from __future__ import annotations

import argparse
import json
from math import prod

import numpy as np

from ondevice import __version__
from ondevice_bench.cases import Case
from ondevice_bench.loading import Source, load_decoder
from ondevice_bench.measure import measure
from ondevice_bench.traffic import model_bytes


def main() -> None:
    """Runs the tests and prints one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tests", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repetitions", type=int, required=True)
    parser.add_argument("--cold", type=int, default=0)
    options = parser.parse_args()
    cases = {name: Case(*case) for *case, name in json.loads(options.tests)}
    decoder = load_decoder(Source(options.model), "cpu", options.threads, list(cases.values()))
    between = np.ones(options.cold // 8, np.int64).max if options.cold else None
    samples = {
        name: measure(decoder, case, options.repetitions, between=between).samples for name, case in cases.items()
    }
    parameters = sum(prod(shape) for shape in decoder.spec.tensors().values())
    version = f"ondevice {__version__}"
    answer = {"samples": samples, "bytes": model_bytes(decoder), "parameters": parameters, "version": version}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

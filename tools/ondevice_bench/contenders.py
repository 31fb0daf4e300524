"""The programs that run in turn, each time in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ondevice.errors import OndeviceError
from ondevice_bench.cases import Case

OURS = "ondevice"


@dataclass(frozen=True, slots=True)
class Contender:
    """One program with its settings.

    Args:
        name: for the results.
        command: its process; the options that both runners know are added.
    """

    name: str
    command: tuple[str, ...]

    def run(self, cases: Sequence[Case], threads: int, repetitions: int, cold: int) -> dict[str, Any]:
        """Runs tests.

        Args:
            cold: bytes to read before each step, so that the weights are not in the cache; 0 for none.

        Returns:
            Keys "samples" (tok/s by test), "bytes", "parameters" and "version".

        Raises:
            OndeviceError: the process failed.
        """
        tests = json.dumps([[case.kind, case.tokens, case.depth, case.batch, case.name] for case in cases])
        options = {"tests": tests, "threads": threads, "repetitions": repetitions, "cold": cold}
        command = [*self.command, *(part for key, value in options.items() for part in (f"--{key}", str(value)))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as e:
            raise OndeviceError(f"{self.name}: {command[0]} does not start: {e}; see --llama-python") from e
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise OndeviceError(f"{self.name}: ended with code {done.returncode}: {last}")
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer


def ours(model: str) -> Contender:
    """This package on a model."""
    return Contender(OURS, (sys.executable, "-m", "ondevice_bench.run_ours", model))


def llamas(python: Path, models: Sequence[Path], flash: Sequence[str], repack: Sequence[str]) -> list[Contender]:
    """llama.cpp in every variant.

    Args:
        python: an interpreter that has llama-cpp-python.
        models: GGUF files.
        flash, repack: "on", "off" or both.
    """
    runner = str(Path(__file__).with_name("run_llama.py"))
    # The path as given: resolving it would lead out of the virtual environment.
    start = (os.path.abspath(python), runner)
    return [
        Contender(f"llama.cpp {model.name}, flash {f}, repack {r}", (*start, str(model), "--flash", f, "--repack", r))
        for model, f, r in product(models, flash, repack)
    ]

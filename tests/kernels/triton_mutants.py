"""Plants faults in the kernels, one at a time, and asks the cases: `python -m tests.kernels.triton_mutants [KERNEL...]`

A fault is a text of one file and what stands in its place. The file is loaded again with it, and what other modules
have imported from it is exchanged. Each runs in a forked process, for some read memory that is not theirs; a crash, an
exception or a wrong result finds it. Prints each with the case that found it, and JSON last.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

from ondevice_bench.gpu_parity import CASES
from ondevice_parity.cases import run_case
from ondevice_parity.torch_home import TorchHome
from tests.kernels.triton_faults import MUTANTS, Mutant

HOME = TorchHome(torch.device("cpu"))
SECONDS = 300
"""After which a fault counts as not found."""


def plant(mutant: Mutant, folder: Path) -> None:
    """Loads a file with its fault, and gives it to all modules that had the file's contents.

    Raises:
        AssertionError: the fault's text does not occur exactly once.
    """
    original = sys.modules[f"cuda_kernels.{mutant.file}"]
    assert original.__file__
    text = Path(original.__file__).read_text()
    assert text.count(mutant.old) == 1, f"{mutant} occurs {text.count(mutant.old)} times"
    path = folder / f"{mutant.file}.py"
    path.write_text(text.replace(mutant.old, mutant.new))
    spec = importlib.util.spec_from_file_location(f"mutant_{mutant.file}", path)
    assert spec and spec.loader
    changed = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = changed
    spec.loader.exec_module(changed)
    before = {name: value for name, value in vars(original).items() if _own(value)}
    for module in [m for name, m in sys.modules.items() if name.startswith("cuda_kernels.")]:
        for name, value in before.items():
            if vars(module).get(name) is value:
                setattr(module, name, getattr(changed, name))


def _own(value: object) -> bool:
    return inspect.isfunction(value) or type(value).__module__.startswith("triton.runtime")


def finds(kernel: str) -> str:
    """The first case that fails, or ''."""
    for name in CASES[kernel]:
        try:
            if not run_case(HOME, kernel, name, seed=5, cases=CASES).passed:
                return name
        except Exception:
            return name
    return ""


def found_by(mutant: Mutant) -> str:
    """The case that finds a fault, "a crash", or '' if nothing does."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(SECONDS)
        # What a fault makes the interpreter say is not of interest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with tempfile.TemporaryDirectory() as folder:
            plant(mutant, Path(folder))
            os.write(write, (finds(mutant.kernel) or "nothing").encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "" if os.WTERMSIG(status) == 14 else "a crash"
    return "" if text in ("", "nothing") else text


def main(kernels: list[str]) -> None:
    """Plants the faults of some kernels, or of all, and prints what found them."""
    torch.set_num_threads(1)
    for kernel in CASES:
        importlib.import_module(f"cuda_kernels.{kernel}")
    results = []
    for mutant in [m for m in MUTANTS if not kernels or m.kernel in kernels]:
        case = found_by(mutant)
        print(
            f"{mutant.kernel:20} {case or 'NOT FOUND':36} {mutant.old.strip()!r:.70} -> {mutant.new.strip()!r:.70}",
            flush=True,
        )
        results.append({**asdict(mutant), "found_by": case})
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])

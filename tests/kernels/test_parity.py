"""One case table, all homes: each case of each kernel against float64, or the reason why a home does not run it.

A home that needs a GPU runs here in what stands in for one: Triton's interpreter, or the emulator of tests/msl, which
runs the threads of a kernel in several orders.
"""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ondevice.cli import cli
from ondevice_parity import homes, parity
from ondevice_parity.cases import ALL, CASES, run_case
from ondevice_parity.cases_ffn import FfnCase
from ondevice_parity.check import Home, Unsupported
from ondevice_parity.ops_home import Lists
from ondevice_parity.parity import Cell, Report
from tests.kernels import parity_table
from tests.kernels.triton_home import needs_triton

README = Path(__file__).parents[2] / "README.md"
MLX_KERNELS = [kernel for kernel in CASES if kernel not in ("quantized_linear", "sparse_inputs")]
"""Of Metal and its twins: MLX multiplies quantized weights itself, and inputs are masked."""
REASONS = (
    "steps of an op table have a token at least",
    "groups of heads are chosen for attention alone, and cannot be read",
    "an op table's tokens all vote",
    "keys are chosen by half of a head, and this is",
)
"""Why a home may leave a case out. Anything else is a fault."""


def _triton(twin: bool) -> Callable[[], Home]:
    def make() -> Home:
        import torch

        from ondevice_parity.torch_home import TorchHome

        return TorchHome(torch.device("cpu"), twin)

    return make


OPENERS: dict[str, Callable[[], Home]] = {
    "reference": homes.HOMES["reference"].open,
    "cpu": homes.HOMES["cpu"].open,
    "metal": homes.HOMES["metal"].open,
    "mlx": homes.HOMES["mlx"].open,
    "triton": _triton(twin=False),
    "torch": _triton(twin=True),
}
"""How tests open homes. Another one drops in here, and in `ondevice_parity.homes.HOMES`."""
needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx") is None, reason="MLX is not installed (extra `mlx-cpu`)")
MARKS: dict[str, Any] = {"metal": needs_mlx, "mlx": needs_mlx, "triton": needs_triton, "torch": needs_triton}
PARAMETERS = [
    pytest.param(home, kernel, name, marks=MARKS.get(home, ()))
    for home in OPENERS
    for kernel, name in ALL
    if home not in ("metal", "mlx") or kernel in MLX_KERNELS
]
_opened: dict[str, Home] = {}


def opened(name: str) -> Home:
    if name not in _opened:
        _opened[name] = OPENERS[name]()
    return _opened[name]


@pytest.fixture
def orders(request: pytest.FixtureRequest, home: str) -> Iterator[Iterable[object]]:
    """Orders of threads in which a home runs its kernels: one, but for the emulator."""
    if home != "metal":
        yield ["its own"]
        return
    from tests.kernels.metal_home import running

    metal = request.getfixturevalue("metal")
    with running():
        yield metal.schedules()


@pytest.mark.parametrize(("home", "kernel", "name"), PARAMETERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_against_float64(home: str, kernel: str, name: str, orders: Iterable[object]) -> None:
    """Each order with other numbers."""
    for i, order in enumerate(orders):
        try:
            outcome = run_case(opened(home), kernel, name, seed=zlib.crc32(name.encode()) + i)
        except Unsupported as e:
            assert str(e).startswith(REASONS), e
            pytest.skip(str(e))
        assert outcome.passed, (order, outcome)


def reversed_lists(lists: Lists) -> Lists:
    return replace(lists, indices=lists.indices[:, ::-1])


@pytest.mark.parametrize("home", ["reference", "cpu"])
def test_a_wrong_kernel_is_found(home: str) -> None:
    """Each kernel of a home, spoiled a little, fails; so the table is worth something."""
    mine = opened(home)
    for kernel in CASES:
        name = next(n for n in CASES[kernel] if "one" not in n and n != "first positions")

        class Wrong:
            """The home, with results that are off by a twentieth, and lists turned round."""

            def __getattr__(self, attribute: str) -> Any:
                return getattr(mine, attribute)

            def kernel(self, name: str, twin: bool = False) -> Any:
                def run(*args: Any, **more: Any) -> Any:
                    got = mine.kernel(name)(*args, **more)
                    if isinstance(got, tuple):
                        return got[0], reversed_lists(got[1])
                    if isinstance(got, Lists):
                        return reversed_lists(got)
                    return got * 1.05

                return run

        try:
            assert not run_case(Wrong(), kernel, name, seed=1).passed, kernel  # type: ignore[arg-type]
        except Unsupported:
            continue


def test_a_case_that_raises_has_failed() -> None:
    class Broken(type(opened("reference"))):  # type: ignore[misc]
        def kernel(self, name: str, twin: bool = False) -> Any:
            raise ZeroDivisionError("oops")

    table = {"sparse_ffn_rows": {"a": FfnCase(1, (8, 8, 8), (1,)), "b": FfnCase(1, (8, 8, 8), (1,))}}
    broken = Broken.__new__(Broken)
    broken.__dict__.update(opened("reference").__dict__)
    cell = parity.kernel_cell(broken, "sparse_ffn_rows", 0, table)
    assert cell.cases == 2 and cell.failed["b"] == "ZeroDivisionError: oops"
    assert cell.text == "FAILED 2 of 2: a, ZeroDivisionError: oops"


def small_report() -> Report:
    cells = {kernel: Cell(cases=3, error=2e-7) for kernel in CASES}
    cells["select_topk"].not_run = {"why": 2}
    return Report(
        {"reference": cells}, {"cpu": "no CPU", "metal": "no Mac", "mlx": "m", "triton": "t", "torch": "u"}, 5
    )


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def fake(seed: int, progress: Any) -> Report:
        seen.append(seed)
        return small_report()

    monkeypatch.setattr(parity, "run", fake)
    shown = CliRunner().invoke(cli, ["doctor", "--parity", "--seed", "5"])
    assert shown.exit_code == 0 and seen == [5]
    assert "| `sparse_ffn_rows` | 2.0e-07 (3) | not run |" in shown.output
    assert "- metal: no Mac" in shown.output and "- reference: 2 cases, why" in shown.output
    document = json.loads(CliRunner().invoke(cli, ["doctor", "--parity", "--json"]).stdout)
    assert document["passed"] and document["homes"]["reference"]["select_topk"]["error"] == 2e-7


def test_a_failure_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    report = small_report()
    report.cells["reference"]["select_topk"].failed = {"ties": "error 1, at most 0"}
    monkeypatch.setattr(parity, "run", lambda seed, progress: report)
    shown = CliRunner().invoke(cli, ["doctor", "--parity"])
    assert shown.exit_code == 1 and "FAILED 1 of 3: ties, error 1, at most 0" in shown.output


def test_homes_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(homes.HOMES, "cpu", homes.Entry(lambda: "on strike", homes.HOMES["cpu"].open))
    report = parity.run(["cpu"])
    assert report.obstacles == {"cpu": "on strike"} and not report.cells and report.passed


@needs_mlx
def test_writing_the_readmes_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Metal's home is a stand-in while the table runs, and no longer."""
    found: list[object] = []

    def fake(seed: int = 0, progress: Any = None) -> Report:
        found.append(homes.HOMES["metal"].obstacle())
        return replace(small_report(), obstacles={})

    monkeypatch.setattr(parity, "run", fake)
    path, before = tmp_path / "R.md", homes.HOMES["metal"]
    path.write_text(f"a\n{parity_table.BEGIN}\nold\n{parity_table.END}\nb\n")
    assert parity_table.main([str(path)]) == 0
    assert found == [None] and homes.HOMES["metal"] is before
    text = path.read_text()
    assert text.startswith(f"a\n{parity_table.BEGIN}\n\n| kernel |") and text.endswith(f"\n\n{parity_table.END}\nb\n")
    path.write_text("no marks")
    assert "no place for the table" in str(parity_table.main([str(path)]))
    monkeypatch.setattr(parity, "run", lambda seed=0, progress=None: small_report())
    assert "no Mac" in str(parity_table.main([str(path)])), "a table with homes that did not run is not written"
    assert "give one file" in str(parity_table.main([]))
    failed = small_report()
    failed.cells["reference"]["select_topk"].failed = {"ties": "error 1, at most 0"}
    monkeypatch.setattr(parity, "run", lambda seed=0, progress=None: failed)
    assert "FAILED 1 of 3" in str(parity_table.main([str(path)]))


def test_a_home_that_does_not_open_is_a_failure_of_that_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Home:
        raise OSError("its library is for a newer system")

    monkeypatch.setattr(parity, "CASES", {"select_threshold": CASES["select_threshold"]})
    monkeypatch.setitem(homes.HOMES, "cpu", homes.Entry(lambda: None, broken))
    report = parity.run(["cpu", "reference"])
    assert not report.passed and "newer system" in report.cells["cpu"]["select_threshold"].text
    assert report.cells["reference"]["select_threshold"].cases > 5


def test_the_readme_has_a_table_of_this_form() -> None:
    """Written by the command: rows and columns of this version, errors or reasons in the cells, nothing failed."""
    text = README.read_text(encoding="utf-8")
    assert text.count(parity_table.BEGIN) == text.count(parity_table.END) == 1
    block = text.split(parity_table.BEGIN)[1].split(parity_table.END)[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block if line.startswith("|")]
    assert rows[0] == ["kernel", *homes.HOMES] and [row[0] for row in rows[2:]] == [f"`{kernel}`" for kernel in CASES]
    for row in rows[2:]:
        for home, cell in zip(homes.HOMES, row[1:]):
            assert cell in ("-", "not run") or float(cell.split(" (")[0]) < 0.05, (row[0], home, cell)
            assert cell != "not run"
            assert cell != "-" or (home in ("metal", "mlx") and row[0].strip("`") not in MLX_KERNELS), (row[0], home)

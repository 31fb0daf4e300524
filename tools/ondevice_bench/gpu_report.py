"""The table that `ondevice_bench.gpu` prints last."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def _rows(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _error(record: Record) -> str:
    return "-" if record["error"] is None else f"{record['error']:.1e}"


def table(results: Record) -> str:
    """Everything that was found, as Markdown.

    Args:
        results: what the JSON file holds; stages may be empty.
    """
    machine = results["machine"]
    lines = [f"## {machine['device']}, torch {machine['torch']}, triton {machine['triton']}", ""]
    lines += (
        _parity([*results["parity"], *results.get("models", [])])
        + _layers(results["layers"])
        + _decode(results["decode"])
    )
    lines += [f"{name} took {seconds} s" for name, seconds in results["seconds"].items()]
    lines += [f"**{name} went wrong**: {text}" for name, text in results["wrong"].items()]
    return "\n".join(lines)


def _parity(records: list[Record]) -> list[str]:
    rows, failed = [], []
    for kernel in dict.fromkeys(record["kernel"] for record in records):
        mine = [record for record in records if record["kernel"] == kernel]
        passed = sum(record["passed"] for record in mine)
        worst = max((r["error"] / (r["tolerance"] or 1) for r in mine if r["error"] is not None), default=0.0)
        rows.append([kernel, f"{passed} of {len(mine)}", f"{worst:.2f}"])
        failed += [f"- failed: {kernel}, {r['case']}: error {_error(r)}, allowed {r['tolerance']:.3g} {r['raised']}"
                   for r in mine if not r["passed"]]  # fmt: skip
    return [*_rows(["kernel", "cases within tolerance", "largest error / tolerance"], rows), *failed, ""]


def _layers(records: list[Record]) -> list[str]:
    head = ["what", "density", "ms", "dense torch ms", "speed-up", "floor ms", "of copy", "error"]
    rows, notes = [], []
    for r in records:
        if "failed" in r:
            notes.append(f"- failed: {r['what']}: {r['failed']}")
        elif "bytes_per_s" in r:
            notes.append(f"- copy within the device: {r['bytes_per_s'] / 1e9:.0f} GB/s, read and written")
        elif "density" not in r:
            more = [f"{key} {r[key]}" for key in ("layout", "first_product_ms") if key in r]
            notes.append(f"- {r['what']}: {r['ms']:.4f} ms ({r['low']:.4f} to {r['high']:.4f}) {' '.join(more)}")
        else:
            times = [f"{r['ms']:.4f}", f"{r['dense_ms']:.4f}", f"{r['speedup']:.2f}", f"{r['floor_ms']:.4f}"]
            rows.append([r["what"], f"{r['density']:.2f}", *times, f"{r['of_copy']:.2f}", _error(r)])
    return [*_rows(head, rows), *notes, ""]


def _decode(records: list[Record]) -> list[str]:
    head = ["batch", "heads", "neurons", "dense, torch attention tok/s", "dense, our attention tok/s", "polar tok/s",
            "speed-up over the faster dense", "of copy: dense, polar", "layers with own KV",
            "error of all selected"]  # fmt: skip
    rows = []
    for r in records:
        speeds = [f"{r[name]['tokens_per_s']:.1f}" for name in ("dense_torch", "dense_ours", "polar")]
        own = f"{r['layers_with_own_cache']} of {r['layers']}"
        sizes = [str(r["batch"]), f"{r['heads']:.2f}", f"{r['rows']:.3f}"]
        dense = max(r["dense_torch"]["of_copy"], r["dense_ours"]["of_copy"])
        reached = f"{dense:.2f}, {r['polar']['of_copy']:.2f}"
        rows.append([*sizes, *speeds, f"{r['speedup']:.2f}", reached, own, _error(r)])
    return _rows(head, rows)

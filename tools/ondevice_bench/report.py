"""Results as rows, and rows as a table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ondevice import __version__
from ondevice.commands.progress import size
from ondevice.machine import cpu_name
from ondevice_bench.measure import Result

Row = dict[str, Any]
OUTPUTS = ("md", "csv", "json")
LISTS = ("samples_ts", "profile")
"""Keys whose values are lists."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the rows of one load have in common.

    Args:
        model: its name.
        nbytes: of its packed weights.
        bits_per_weight: embedding and head included.
        backend: name of the op table.
        threads: None where the table does not say.
        read_gbs: what the memory gives to so many threads.
        sparsity: the method and what was forced.
        device: that the backend runs on; None where its name says enough.
        kv_bits: of keys and values; None where they are floats.
    """

    model: str
    nbytes: int
    bits_per_weight: float
    backend: str
    threads: int | None
    read_gbs: float
    sparsity: str = "dense"
    device: str | None = None
    kv_bits: int | None = None


def row(setting: Setting, result: Result, dense: Result | None = None) -> Row:
    """One result with the keys of the JSON document. dense: of the dense model that ran in turn."""
    case, samples = result.case, result.samples
    mean = statistics.fmean(samples)
    gbs = mean * result.bytes_per_token / 1e9
    return {
        "test": case.name,
        "depth": case.depth,
        "batch": case.batch,
        "backend": setting.backend,
        "device": setting.device,
        "kv_bits": setting.kv_bits,
        "threads": setting.threads,
        "model": setting.model,
        "sparsity": setting.sparsity,
        "avg_ts": mean,
        "stddev_ts": statistics.stdev(samples) if len(samples) > 1 else None,
        "median_ts": statistics.median(samples),
        "samples_ts": samples,
        "bytes_per_token": round(result.bytes_per_token),
        "achieved_gbs": gbs,
        "read_gbs": setting.read_gbs,
        "read_share": gbs / setting.read_gbs,
        "ffn_density": _density(result, "ffn"),
        "head_density": _density(result, "heads"),
        "speedup": statistics.median(samples) / statistics.median(dense.samples) if dense else None,
        "model_bytes": setting.nbytes,
        "bits_per_weight": setting.bits_per_weight,
        "profile": None if result.profile is None else result.profile.rows(),
        "cpu": cpu_name(),
        "version": __version__,
    }


def _density(result: Result, kind: str) -> float:
    tally = result.skipped.get(kind)
    return tally.kept / tally.units if tally and tally.units else 1.0


def render(rows: Sequence[Row], output: str) -> str:
    """The rows as text.

    Args:
        output: one of OUTPUTS; CSV leaves lists out.
    """
    if output == "json":
        return json.dumps(list(rows), indent=1)
    if output == "csv":
        return _csv(rows)
    return "\n\n".join([_table(rows), _memory(rows), *(_profile(r) for r in rows if r["profile"])])


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [key for key in rows[0] if key not in LISTS], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip()


def _table(rows: Sequence[Row]) -> str:
    return markdown(
        [
            {
                "model": r["model"],
                "size": size(r["model_bytes"]),
                "bits/weight": f"{r['bits_per_weight']:.2f}",
                "backend": _backend(r),
                "threads": str(r["threads"] or "-"),
                "test": r["test"],
                "tok/s": f"{r['avg_ts']:.2f}" + ("" if r["stddev_ts"] is None else f" ± {r['stddev_ts']:.2f}"),
                "bytes/token": size(r["bytes_per_token"]),
                "GB/s": f"{r['achieved_gbs']:.1f}",
                **({} if all(r["sparsity"] == "dense" for r in rows) else _skipping(r)),
            }
            for r in rows
        ],
        left=("model", "backend", "test", "sparsity"),
    )


def _backend(row: Row) -> str:
    """The backend, where it runs, and bits of keys and values where they are not floats."""
    where = f" on {row['device']}" if row["device"] else ""
    return f"{row['backend']}{where}" + (f", kv {row['kv_bits']}-bit" if row["kv_bits"] else "")


def _skipping(row: Row) -> dict[str, str]:
    """Columns of tables where something is skipped."""
    speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}"
    return {"sparsity": row["sparsity"], "FFN": f"{100 * row['ffn_density']:.0f} %", "speed-up": speedup}


def _memory(rows: Sequence[Row]) -> str:
    """What the memory gives, once for each number of threads, and what generation reaches of it."""
    lines = []
    for threads in dict.fromkeys(r["threads"] for r in rows):
        mine = [r for r in rows if r["threads"] == threads]
        shares = ", ".join(f"{r['test']} {100 * r['read_share']:.0f} %" for r in mine if r["test"].startswith("tg"))
        who = f"{threads} thread{'s' if threads > 1 else ''}" if threads else "all threads"
        reached = f"; reached: {shares}" if shares else ""
        lines.append(f"memory as measured here: {mine[0]['read_gbs']:.1f} GB/s read by {who}{reached}")
    return "\n".join(lines)


def _profile(row: Row) -> str:
    shown = [
        {
            "part": part["part"],
            "µs/token": f"{part['us_per_token']:.1f}",
            "share": f"{100 * part['share']:.1f} %",
            "GB/s": "-" if part["gbs"] is None else f"{part['gbs']:.1f}",
        }
        for part in row["profile"]
    ]
    return f"{row['test']}, {row['threads']} threads:\n\n" + markdown(shown, left=("part",))


def markdown(rows: Sequence[Mapping[str, str]], left: Sequence[str] = ()) -> str:
    """A table whose source is aligned too.

    Args:
        rows: text of each cell by column; all have the same columns.
        left: columns aligned to the left, others to the right.
    """
    columns = list(rows[0])
    width = {c: max(len(c), *(len(r[c]) for r in rows), 3) for c in columns}

    def line(cells: Mapping[str, str]) -> str:
        parts = [f"{cells[c]:<{width[c]}}" if c in left else f"{cells[c]:>{width[c]}}" for c in columns]
        return f"| {' | '.join(parts)} |"

    rule = {c: "-" * width[c] if c in left else "-" * (width[c] - 1) + ":" for c in columns}
    return "\n".join([line({c: c for c in columns}), line(rule), *map(line, rows)])

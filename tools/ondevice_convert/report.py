"""REPORT.md and report.json: how a model was made, and what that cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ondevice_bench.report import markdown
from ondevice_convert.budget import Point
from ondevice_convert.fitted import LayerFit
from ondevice_convert.pictures import curve_svg, layers_svg, recall_svg
from ondevice_convert.quality import Quality
from ondevice_convert.speed import Speed

PICTURES = "report"
"""Folder of the pictures, beside REPORT.md."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that is told.

    Args:
        made: options, seeds, versions, the text's name and hash: what makes the same model again.
        weights: format and bytes before and after, and errors of rounding.
        quality: by text and what is compared, such as "unseen text".
        speed: of the dense model and the converted one, decoding in turn; None where nothing was measured.
        layers: of a method.
        curve: of other densities.
        blocks: rows of what an oracle loses by block size.
        notes: what was refused, and other sentences.
    """

    made: Mapping[str, Any]
    weights: Mapping[str, Any]
    quality: Mapping[str, Quality] = field(default_factory=dict)
    speed: tuple[Speed, Speed] | None = None
    layers: Sequence[LayerFit] = ()
    curve: Sequence[Point] = ()
    blocks: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    def document(self) -> dict[str, Any]:
        """As report.json has it."""
        return {
            "made": dict(self.made),
            "weights": dict(self.weights),
            "quality": {name: asdict(quality) for name, quality in self.quality.items()},
            "speed": self.speed and {"dense": asdict(self.speed[0]), "converted": asdict(self.speed[1])},
            "layers": [{**asdict(fit), "oracle_share": fit.oracle_share} for fit in self.layers],
            "curve": [asdict(point) for point in self.curve],
            "blocks": [dict(row) for row in self.blocks],
            "notes": list(self.notes),
        }

    def write(self, folder: Path) -> None:
        """Writes both files and the pictures into a folder."""
        pictures: dict[str, str] = {}
        if self.layers:
            pictures |= {"layers.svg": layers_svg(self.layers), "recall.svg": recall_svg(self.layers)}
        if self.curve:
            pictures["curve.svg"] = curve_svg(self.curve)
        if pictures:
            (folder / PICTURES).mkdir(exist_ok=True)
        for name, picture in pictures.items():
            (folder / PICTURES / name).write_text(picture, encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")
        (folder / "REPORT.md").write_text(self._markdown(list(pictures)), encoding="utf-8")

    def _markdown(self, pictures: Iterable[str]) -> str:
        sections = [("How it was made", _facts(self.made)), ("Weights", _facts(self.weights))]
        if self.quality:
            sections.append(("Quality", _quality_table(self.quality)))
        if self.speed:
            sections.append(("Speed", _speed_table(self.speed)))
        if self.notes:
            sections.append(("Refused, and other notes", "\n".join(f"- {note}" for note in self.notes)))
        if self.layers:
            sections.append(("Layers", _layer_table(self.layers)))
        if self.curve:
            sections.append(("Other densities", _curve_table(self.curve)))
        if self.blocks:
            sections.append(("Size of blocks", BLOCKS + markdown([_texts(row) for row in self.blocks])))
        if pictures:
            sections.append(("Pictures", "\n".join(f"![{name}]({PICTURES}/{name})" for name in pictures)))
        return "# How this model was made, and what that cost\n\n" + "\n".join(
            f"## {title}\n\n{text.rstrip()}\n" for title, text in sections
        )


BLOCKS = """Part of an FFN's output (its square) that is lost where an oracle keeps the largest contributions, by the
neurons that are kept together; means over the layers that were looked at. A predictor loses more.

"""


def _facts(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in row.items()}


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _quality_table(quality: Mapping[str, Quality]) -> str:
    rows = [
        {
            "": name,
            "perplexity": f"{q.perplexity:.3f}" + ("" if q.stderr is None else f" ± {q.stderr:.3f}"),
            "rise": _percent(q.rise),
            "upper bound (95 %)": _percent(q.rise_upper),
            "KL": f"{q.kl:.2e}",
            "same top 1": _percent(q.agreement),
            "kept": ", ".join(f"{part:.3f} of {kind}" for kind, part in q.density.items()),
            "tokens": str(q.tokens),
        }
        for name, q in quality.items()
    ]
    return markdown(rows, left=("", "kept"))


def _speed_table(speed: tuple[Speed, Speed]) -> str:
    rows = [
        {
            "": name,
            "tok/s": f"{s.tokens_per_second:.1f}",
            "of dense": f"{s.speedup:.3f}",
            "95 % interval": f"{s.low:.3f} to {s.high:.3f}",
            "MB a token": f"{s.bytes_per_token / 1e6:.1f}",
            "layers planned dense": str(s.dense_layers),
        }
        for name, s in zip(("dense", "converted"), speed)
    ]
    return "Decoding one sequence on the machine that made it, both in turn.\n\n" + markdown(rows, left=("",))


def _layer_table(layers: Sequence[LayerFit]) -> str:
    rows = [
        {
            "layer": str(fit.layer),
            "of": fit.what if fit.unit == 1 else f"{fit.what}, {fit.unit} together",
            "kept": f"{fit.density:.3f}",
            "recall": f"{fit.recall:.3f}",
            "lost": f"{fit.lost:.5f}",
            "oracle loses": f"{fit.oracle_lost:.5f}",
            "chance loses": f"{fit.random_lost:.5f}",
            "share of the oracle's benefit": f"{fit.oracle_share:.3f}",
        }
        for fit in layers
    ]
    return markdown(rows)


def _curve_table(curve: Sequence[Point]) -> str:
    rows = [
        {
            "density": f"{p.density:g}",
            "rise of perplexity": _percent(p.quality.rise),
            "KL": f"{p.quality.kl:.2e}",
            "of dense speed": f"{p.speed.speedup:.3f}",
            "95 % interval": f"{p.speed.low:.3f} to {p.speed.high:.3f}",
            "MB a token": f"{p.speed.bytes_per_token / 1e6:.1f}",
        }
        for p in curve
    ]
    intro = "All layers at one density of single neurons and all of them skipping, on text that was fitted on.\n\n"
    return intro + markdown(rows)

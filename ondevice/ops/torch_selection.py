"""Selections as masks on torch's device: no step waits for the host to learn what is in them."""

from __future__ import annotations

import torch

from ondevice.sparsity.selection import HeadSelection, Selection


def largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """bool [N, M] of each row's k largest; of equal ones the first."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, order, True)


def select_topk(scores: torch.Tensor, k: int, shared: bool) -> Selection:
    """The k largest of each token, or of the sums over tokens of relu(score)."""
    if shared:
        wide = torch.promote_types(scores.dtype, torch.float32)
        scores = scores.to(wide).relu().sum(0, keepdim=True)
    return Selection(largest(scores, k), scores.shape[1], shared)


def select_threshold(scores: torch.Tensor, threshold: float, relative: bool) -> Selection:
    """Scores above a border, or near the row's largest."""
    if not relative:
        return Selection(scores > threshold, scores.shape[1], False)
    most = scores.amax(1, keepdim=True)
    return Selection((scores >= threshold * most) | (scores == most), scores.shape[1], False)


def sizes(x: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """|x| * factor."""
    return x.abs() if factors is None else x.abs() * factors


def statistical_topk(scores: torch.Tensor, c: float) -> tuple[torch.Tensor, Selection]:
    """What exceeds mean + c * deviation, and where."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    mean = wide.mean(1, keepdim=True)
    border = mean + c * (wide - mean).square().mean(1, keepdim=True).sqrt()
    return (wide - border).relu().to(scores.dtype), Selection(wide > border, scores.shape[1], False)


def random_mask(rows: int, units: int, density: float, device: torch.device) -> torch.Tensor:
    """bool [rows, units], each row with its part of random units, drawn anew at each call."""
    return largest(torch.rand(rows, units, device=device), round(density * units))


def select_heads(scores: torch.Tensor, k: int, group: int) -> HeadSelection:
    """The k heads, or groups of heads, of the largest scores."""
    return HeadSelection(largest(scores.unflatten(1, (-1, group)).amax(2), k), k, group)


def only_heads(out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention's result [N, H * dh] with units of heads, bool [N, units], that were not selected set to 0."""
    parts = out.unflatten(1, (mask.shape[1], -1))
    return torch.where(mask[:, :, None], parts, 0).flatten(1)

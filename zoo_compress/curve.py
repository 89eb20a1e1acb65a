"""Accuracy against average MACs: each exit of a network, batches on a budget (Huang et al. 2018, section 5), and each of its widths."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import CompressError
from .record import aligned
from .structure.exits import Confidence, budgeted
from .surgery.exits import Costs, ExitsModel
from .surgery.images import fitting
from .surgery.leaving import MEASURES
from .surgery.modules import evaluating

BUDGETS = (0.25, 0.5, 0.75, 1.0)
"""Average MACs of a sample, as fractions of the network's without heads."""


@dataclass(frozen=True)
class Point:
    """One way to spend MACs on test images.

    Attributes:
        label: Which one: an exit, or a budget.
        width: Of a network with several.
        macs: Of a sample on average, heads on the way included; None of a budget that no thresholds reach.
        share: The same, as a fraction of those of the whole network without heads.
        top1: Accuracy in percent.
        fractions: Of the samples, that leave at each exit, the network's own end last.
    """

    label: str
    width: float | None
    macs: float | None
    share: float | None
    top1: float | None
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class _Seen:
    """What every exit makes of some images: confidence (samples, exits), and whether it is right (samples, exits + 1)."""

    confidence: np.ndarray
    right: np.ndarray


def curve(
    net: nn.Module,
    held_out: Iterable[tuple[torch.Tensor, torch.Tensor]],
    test: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    budgets: Sequence[float] = BUDGETS,
    confidence: Confidence = "max_softmax",
) -> list[Point]:
    """Every exit, and every budget, of every width of a network.

    Args:
        net: A network with exits. Knobs are afterwards where they were.
        held_out: Batches of images and class indices that thresholds are found on, for each budget anew.
        test: Batches that accuracies are of.
        budgets: Average MACs, as fractions of those of the whole network (its widest width) without heads.
        confidence: What the thresholds measure.

    Raises:
        CompressError: If the network has no exits, or there are no images.
    """
    if not isinstance(net, ExitsModel) or net.record.truncated:
        raise CompressError(f"curve: expected a network with exits, found {type(net).__name__}")
    adjustable: Any = net
    before = adjustable.chosen()
    found = []
    try:
        whole: float | None = None
        for width in sorted(adjustable.knobs().get("width", (None,)), key=lambda width: -(width or 1)):
            if width is not None:
                adjustable.set_width(width)
            costs = net.all_costs()
            whole = whole or costs.base
            found += _points(_seen(net, held_out, confidence), _seen(net, test, confidence), costs, whole, budgets, width)
    finally:
        adjustable.use(before)
    return found


def _points(held_out: _Seen, test: _Seen, costs: Costs, whole: float, budgets: Sequence[float], width: float | None) -> list[Point]:
    top1 = 100 * test.right.mean(0)
    exits = len(costs.alone) - 1
    found = []
    for i, cost in enumerate(costs.alone):
        fractions = tuple(float(i == k) for k in range(exits + 1))
        found.append(Point(f"exit {i}" if i < exits else "end", width, cost, cost / whole, float(top1[i]), fractions))
    for budget in budgets:
        label = f"budget {budget:.0%}"
        try:
            thresholds = budgeted(held_out.confidence, costs.batch, budget * whole).thresholds
        except CompressError:  # out of reach, at this width
            found.append(Point(label, width, None, None, None, ()))
            continue
        left = _left(test.confidence, thresholds)
        macs = float(np.asarray(costs.batch)[left].mean())
        right = float(100 * test.right[np.arange(len(left)), left].mean())
        shares = np.bincount(left, minlength=exits + 1) / len(left)
        found.append(Point(label, width, macs, macs / whole, right, tuple(shares.tolist())))
    return found


def _left(confidence: np.ndarray, thresholds: Sequence[float | None]) -> np.ndarray:
    """At which exit each sample leaves, (samples,), as in `infer`."""
    leaves = np.stack([np.zeros(len(confidence), bool) if t is None else confidence[:, k] >= t for k, t in enumerate(thresholds)], 1)
    return np.where(leaves.any(1), leaves.argmax(1), confidence.shape[1])


@torch.no_grad()
def _seen(net: ExitsModel, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], confidence: str) -> _Seen:
    measure = MEASURES[confidence]
    sure, right = [], []
    with evaluating(net), net.every_output():
        for images, target in batches:
            logits = [each.float() for each in net(fitting(net, images))]
            sure.append(torch.stack([measure(each) for each in logits[:-1]], 1).double().cpu().numpy())
            right.append(torch.stack([each.argmax(1).cpu() == target.cpu() for each in logits], 1).numpy())
    if not sure:
        raise CompressError("curve: expected at least one batch of images, found none")
    return _Seen(np.concatenate(sure), np.concatenate(right))


def format_curves(curves: Sequence[Sequence[Point]]) -> str:
    """The table for people. Of several networks of one structure, such as runs with other seeds, mean and standard deviation of accuracy.

    Raises:
        CompressError: If they are not of one structure.
    """
    first = curves[0]
    if any([(p.label, p.width) for p in points] != [(p.label, p.width) for p in first] for points in curves):
        raise CompressError("curve: expected networks with the same exits, widths and budgets")
    widths = any(point.width is not None for point in first)
    lines = [["", *(["width"] if widths else []), "average MACs", "top-1", "leave at each exit"]]
    for points in zip(*curves, strict=True):
        reached = [point for point in points if point.macs is not None and point.share is not None and point.top1 is not None]
        cells = [points[0].label, *([f"{points[0].width:g}"] if widths else [])]
        if not reached:
            lines.append([*cells, "out of reach", "", ""])
            continue
        share = statistics.mean(float(point.share or 0) for point in reached)
        top1 = [float(point.top1 or 0) for point in reached]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        leave = np.mean([point.fractions for point in reached], 0)
        macs = statistics.mean(float(point.macs or 0) for point in reached)
        shares = " / ".join(f"{fraction:.0%}" for fraction in leave) if points[0].label.startswith("budget") else ""
        lines.append([*cells, f"{macs:,.0f} ({share:.1%})", f"{statistics.mean(top1):.2f}{spread}%", shares])
    table = aligned(lines)
    grid = _grid(first, curves) if widths else ""
    return f"{table}\n\n{grid}" if grid else table


def _grid(first: Sequence[Point], curves: Sequence[Sequence[Point]]) -> str:
    """Top-1 over width and exit."""
    exits = list(dict.fromkeys(point.label for point in first if not point.label.startswith("budget")))
    widths = list(dict.fromkeys(point.width for point in first))
    lines = [["top-1 at width", *exits]]
    for width in widths:
        cells = []
        for exit in exits:
            top1 = [float(point.top1 or 0) for points in curves for point in points if (point.label, point.width) == (exit, width)]
            cells.append(f"{statistics.mean(top1):.2f}%")
        lines.append([f"×{width:g}", *cells])
    return aligned(lines)

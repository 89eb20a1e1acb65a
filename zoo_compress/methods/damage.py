"""Importance by damage: remove what the next layers can best do without, and share the budget by what removal does to the output.

ThiNet (Luo et al. 2017) chooses channels greedily by the error that their removal causes in the next layer. Here the error is that left
after least squares has made up for the removal, over all layers that read the axis, weighed by how much the model's output minds an error
there. How much a whole axis may give is measured: a quarter and a half of it are removed, everything that reads it is reconstructed from
one half of the images, and the divergence of the predictions is taken on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..errors import CompressError
from ..structure import terms
from ..structure.budget import counted
from ..structure.layout import Layout, parse
from ..structure.widths import Group
from ..surgery.divergence import divergence, gives_logits, outputs
from ..surgery.images import fitting, parted
from ..surgery.modules import copied, get_tensor, in_eval_mode
from ..surgery.moments import CHUNK, Moments
from ..surgery.reconstruct import columns_of, reconstruct_, ridge
from ..surgery.resize import resize

TRIALS = (0.25, 0.5)
"""Fractions of a group that are removed to measure the damage."""

TRIAL_IMAGES = 64
"""Images on which damage is measured."""

UNREAD = "l2"
"""The criterion that orders axes which no layer with moments reads (queries and keys, say)."""

SHARE = 32
"""Elements are removed one by one, or this fraction of those left at a time where there are many."""


def damage_scores(
    model: nn.Module,
    layout: Layout,
    groups: Sequence[Group],
    moments: Mapping[str, Moments],
    images: list[torch.Tensor],
    plain: Mapping[str, np.ndarray],
    kind: str,
) -> dict[str, np.ndarray]:
    """Worth of every element of some groups of axes: the damage its removal does, per unit of cost.

    Args:
        model: The model.
        layout: Its layout.
        groups: The groups of axes that may shrink.
        moments: Of the model, with sensitivities.
        images: The batches the moments were gathered from.
        plain: Axis → scores by the criterion `UNREAD`, for the axes that no layer with moments reads.
        kind: What the budget counts, `Budget.kind`; the unit of cost.

    Returns:
        Axis → float array (size,), comparable between axes, falling along the order of removal.
    """
    model = in_eval_mode(copied(model))
    # What time costs is known only once widths are searched; MACs stand in for it.
    unit_costs = counted(layout, [name for group in groups for name in group.axes], "macs" if kind == "latency" else kind)

    def cost(sizes: Mapping[str, int]) -> int:
        return sum(polynomial(sizes) for polynomial in unit_costs)

    held_out = parted(images, 1, CHUNK, TRIAL_IMAGES)
    if not held_out:
        raise CompressError("data: expected at least 2 images to measure damage with, found 1")
    expected = outputs(model, held_out)
    with torch.no_grad():
        logits = gives_logits(model, model(fitting(model, held_out[0][:1])))

    def damage(removals: Mapping[str, Removal], sizes: Mapping[str, int]) -> float:
        widths = {name: np.sort(removals[name].order[layout.axes[name].size - size :]) for name, size in sizes.items()}
        small = resize(model, layout, widths)
        reconstruct_(small, model, layout, widths, moments, halves=(0,))
        return divergence(outputs(small, held_out, layout, widths), expected, logits=logits)

    found: dict[str, np.ndarray] = {}
    for group in tqdm(groups, desc="damage", unit="group", leave=False):
        removals = {name: eliminate(model, layout, name, moments) or _by_score(plain.get(name)) for name in group.axes}
        known = {name: removal for name, removal in removals.items() if removal is not None}
        if len(known) < len(removals):
            continue  # the criterion says nothing of one of them: the group stays as it is
        predicted = np.cumsum([0.0, *sum(removal.curve.reshape(group.steps, -1).sum(1) for removal in known.values())])
        trials = {min(max(1, round(fraction * group.steps)), group.steps - 1) for fraction in TRIALS} - {0}
        measured = {removed: damage(known, group.at(group.steps - removed)) for removed in sorted(trials)}
        unit = cost(layout.base_sizes) - cost({**layout.base_sizes, **group.at(group.steps - 1)}) if group.steps > 1 else 1
        # Never falling along the order of removal, and never equal, so that a choice by score is a choice by order.
        worth = np.maximum.accumulate(np.diff(_scaled(predicted, measured))) / max(unit, 1) * (1 + 1e-9 * np.arange(group.steps))
        for name, removal in known.items():
            found[name] = np.empty(layout.axes[name].size)
            found[name][removal.order] = np.repeat(worth, layout.axes[name].size // group.steps)
    return found


def _scaled(predicted: np.ndarray, measured: Mapping[int, float]) -> np.ndarray:
    """A curve of damage through what was measured, shaped between and beyond as predicted."""
    if not measured:
        return predicted
    places = np.array(sorted(measured))
    ratio = np.log([max(measured[place], 1e-9) / max(predicted[place], 1e-30) for place in places])
    return predicted * np.exp(np.interp(np.arange(len(predicted)), places, ratio))


@dataclass(frozen=True)
class Removal:
    """An order of removal.

    Attributes:
        order: Elements of an axis, the first to go first: (size,).
        curve: What each removal is predicted to add to the damage, in that order: (size,).
    """

    order: np.ndarray
    curve: np.ndarray


def _by_score(score: np.ndarray | None) -> Removal | None:
    """Lowest scores first; damage grows with the square of the part removed."""
    if score is None:
        return None
    size = len(score)
    return Removal(np.argsort(score, kind="stable"), np.diff((np.arange(size + 1) / size) ** 2))


@dataclass
class _Reader:
    """One layer that reads an axis, and what is left of it during elimination.

    Attributes:
        weight: The least squares weights on what is left, (outputs, columns).
        inverse: The inverse covariance of the columns left, (columns, columns); zero where removed.
        importance: Of each output, (outputs,).
        blocks: Columns of each element of the axis, (size, columns of an element).
    """

    weight: torch.Tensor
    inverse: torch.Tensor
    importance: torch.Tensor
    blocks: torch.Tensor

    def errors(self, elements: torch.Tensor) -> torch.Tensor:
        """Error that removing each element alone adds, least squares on the rest included: (elements,)."""
        columns = self.blocks[elements]
        weight = self.weight[:, columns].movedim(1, 0)  # (elements, outputs, columns of an element)
        block = self.inverse[columns[:, :, None], columns[:, None, :]]
        solved = torch.linalg.solve(block, weight.mT)
        return ((weight.mT * solved).sum(1) * self.importance).sum(1)

    def remove(self, elements: torch.Tensor) -> None:
        """Take elements out and let least squares on the rest make up for them."""
        columns = self.blocks[elements].flatten()
        rows = self.inverse[columns]
        step = torch.linalg.solve(rows[:, columns], rows)  # (removed, columns)
        self.weight.addmm_(self.weight[:, columns], step, alpha=-1)
        self.inverse.addmm_(rows.mT, step, alpha=-1)
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0
        self.weight[:, columns] = 0


def eliminate(model: nn.Module, layout: Layout, axis: str, moments: Mapping[str, Moments]) -> Removal | None:
    """Order the elements of an axis by greedy elimination.

    Luo et al. 2017, ThiNet, with the update of Hassibi & Stork 1993, Optimal Brain Surgeon: what is left always is at its least squares.

    Returns:
        The order, or None if no layer with moments reads the axis.
    """
    readers = [reader for name, seen in moments.items() for reader in _readers(model, layout, name, axis, seen)]
    if not readers:
        return None
    size = layout.axes[axis].size
    left = torch.arange(size)
    order, curve = [], []
    while len(left):
        errors = torch.stack([reader.errors(left) for reader in readers]).sum(0)
        worst = errors.argsort(stable=True)[: max(1, len(left) // SHARE)]
        order.append(left[worst])
        curve.append(errors[worst])
        if len(left) > len(worst):
            for reader in readers:
                reader.remove(left[worst])
        left = left[torch.isin(torch.arange(len(left)), worst, invert=True)]
    # Half of the squared error, weighed by curvature, is the damage to second order.
    return Removal(torch.cat(order).numpy(), 0.5 * torch.cat(curve).clamp_min(0).numpy())


def _readers(model: nn.Module, layout: Layout, name: str, axis: str, seen: Moments) -> list[_Reader]:
    dims = layout.params[name]
    places = terms.positions(parse(dims[1]), layout.base_sizes, axis)
    if not len(places):
        return []
    weight = get_tensor(model, name).detach().cpu()
    taps = weight[0, 0].numel()
    blocks = torch.stack([columns_of(torch.from_numpy(row), taps) for row in places])
    covariance, mean, rows = seen.covariance()
    inverses = torch.linalg.inv(covariance + ridge(covariance, rows, mean))
    full = weight.double().reshape(len(covariance), -1, covariance.shape[-1])
    importance = seen.sensitivity.reshape(len(covariance), -1)
    return [_Reader(full[g].clone(), inverses[g], importance[g], blocks) for g in range(len(covariance))]

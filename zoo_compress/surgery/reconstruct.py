"""Reconstruction: least squares restores what each layer gave before some of its inputs were removed.

He et al. 2017, Channel Pruning for Accelerating Very Deep Neural Networks, section 3.1, in closed form on the moments of the whole model's
inputs; every layer that reads a removed element is restored, those on residual paths too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ..structure import terms
from ..structure.layout import Layout, Widths, parse
from .modules import get_tensor
from .moments import Moments
from .resize import picks

RIDGE = 3.0
"""How strongly the solution holds to the weights there were: this much, times columns ÷ rows, of the inputs' mean square. Few images say
little about inputs that are rarely active."""


def reconstruct_(
    resized: nn.Module, model: nn.Module, layout: Layout, widths: Widths, moments: Mapping[str, Moments], halves: Sequence[int] = (0, 1)
) -> list[str]:
    """Give a resized model's layers the weights that restore the whole model's outputs best, in place.

    For every layer that reads fewer inputs than before, the kept outputs are fitted by ridge regression towards the weights that stayed.
    Biases, or the running means of the BatchNorms after layers without bias, take the change of the mean.

    Args:
        resized: What `resize(model, layout, widths)` made.
        model: The model before.
        layout: Its layout.
        widths: The choice.
        moments: From `moments.gather(model, layout, …)`.
        halves: Whose moments count: those of the even images (0), the odd (1), or both.

    Returns:
        Names of the weights that were fitted.
    """
    pick = picks(layout, widths)
    fitted = []
    for name, seen in moments.items():
        rows, columns = (_kept(layout, layout.params[name][d], pick) for d in (0, 1))
        if columns is None:
            continue
        weight = get_tensor(model, name).detach().cpu()
        solution, shift = _fit(weight, seen, columns, halves)
        new = get_tensor(resized, name)
        if rows is not None:
            solution, shift = solution[rows], shift[rows]
        new.data.copy_(solution.reshape(new.shape))
        if seen.bias is not None:
            _add(get_tensor(resized, seen.bias), shift)
        elif seen.norm is not None:
            _add(get_tensor(resized, seen.norm), -shift)
        fitted.append(name)
    return fitted


def _add(tensor: torch.Tensor, change: torch.Tensor) -> None:
    tensor.data.add_(change.to(tensor))


def _kept(layout: Layout, dim: str, pick: Mapping[str, np.ndarray]) -> torch.Tensor | None:
    term = parse(dim)
    if not any(axis in pick for axis in terms.axes(term)):
        return None
    return torch.from_numpy(terms.index(term, layout.base_sizes, pick))


def _fit(weight: torch.Tensor, seen: Moments, kept: torch.Tensor, halves: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (outputs, kept inputs × kernel positions) on the kept inputs, and the change of each output's mean they leave (outputs,)."""
    covariance, mean, rows = seen.covariance(halves)
    groups, taps = len(covariance), weight[0, 0].numel()
    full = weight.double().reshape(groups, len(weight) // groups, -1)
    columns = columns_of(kept, taps)
    part, old = covariance[:, columns][:, :, columns], full[:, :, columns]
    # Towards the weights there were: the regression is on what they leave to explain.
    missing = full @ covariance[:, :, columns] - old @ part
    new = old + torch.linalg.solve(part + ridge(part, rows, mean[:, columns]), missing, left=False)
    shift = (full @ mean[:, :, None] - new @ mean[:, columns, None]).flatten()
    return new.flatten(0, 1), shift


def ridge(covariance: torch.Tensor, rows: int, mean: torch.Tensor) -> torch.Tensor:
    """What is added to covariances before they are inverted: a multiple of the identity, per group.

    It is at least what rounding makes of inputs that hardly differ from their mean: sums are in single precision, and the difference of
    two large ones need not be a covariance at all.

    Args:
        covariance: (groups, columns, columns), about `mean`.
        rows: Number of inputs they are of.
        mean: (groups, columns).
    """
    columns = covariance.shape[-1]
    scale = covariance.diagonal(dim1=1, dim2=2).mean(1) * (RIDGE * columns / max(rows, 1))
    rounding = mean.square().amax(1) * (columns * torch.finfo(torch.float32).eps)
    return scale.maximum(rounding).clamp_min(1e-12)[:, None, None] * torch.eye(columns, dtype=covariance.dtype)


def columns_of(inputs: torch.Tensor, taps: int) -> torch.Tensor:
    """Columns of the flattened weight that belong to some inputs, in their order: (inputs × taps,)."""
    return (inputs[:, None] * taps + torch.arange(taps)).flatten()

"""How far a model's outputs are from another's, and the loss whose curvature says so beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..structure import terms
from ..structure.layout import Layout, Widths, parse
from .images import fitting
from .outputs import tensors_in
from .resize import picks


def outputs(
    model: nn.Module, images: Sequence[torch.Tensor], layout: Layout | None = None, widths: Widths | None = None
) -> list[torch.Tensor]:
    """What a model says of each batch: its output tensors, each (batch, …), joined to one (batch, …) where there are several.

    Args:
        model: The model.
        images: Batches (batch, channels, height, width).
        layout: Of a whole model, of which this one is what `resize` made: what that gave and this does not is then 0 in the outputs.
        widths: The choice.
    """
    pick = picks(layout, widths) if layout is not None and widths is not None else {}
    found = []
    with torch.no_grad():
        for batch in images:
            leaves = tensors_in(model(fitting(model, batch)))
            if layout is not None:
                leaves = [_whole(leaf, dims, layout, pick) for leaf, dims in zip(leaves, layout.outputs, strict=True)]
            found.append(_joined(leaves))
    return found


def _whole(leaf: torch.Tensor, dims: Sequence[str], layout: Layout, pick: Mapping[str, np.ndarray]) -> torch.Tensor:
    for d, text in enumerate(dims):
        term = parse(text)
        if any(axis in pick for axis in terms.axes(term)):
            index = torch.from_numpy(terms.index(term, layout.base_sizes, pick)).to(leaf.device)
            shape = list(leaf.shape)
            shape[d] = terms.size(term, layout.base_sizes)
            leaf = leaf.new_zeros(shape).index_copy_(d, index, leaf)
    return leaf


def divergence(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], *, logits: bool) -> float:
    """Mean over samples of the Kullback-Leibler divergence of predictions from the expected ones, in nats; where the outputs are no
    logits, half of the squared error relative to the squared norm."""
    total, samples = 0.0, 0
    for new, old in zip(found, expected, strict=True):
        new, old = new.double(), old.double()
        if logits:
            total += float(F.kl_div(new.log_softmax(1), old.log_softmax(1), reduction="sum", log_target=True))
        else:
            total += float(0.5 * ((new - old).flatten(1).square().sum(1) / old.flatten(1).square().sum(1).clamp_min(1e-30)).sum())
        samples += len(new)
    return total / max(samples, 1)


def own_loss(output: Any, generator: torch.Generator, *, logits: bool) -> torch.Tensor:
    """A loss, summed over samples, whose squared gradients are unbiased estimates of the curvature of `divergence` at the model itself.

    Logits: cross-entropy with labels drawn from the model's own predictions, which gives the Fisher information (Kunstner et al. 2019,
    Limitations of the Empirical Fisher Approximation). Else: the product with Gaussian noise.
    """
    values = _joined(output)
    if logits:
        drawn = torch.multinomial(values.detach().float().softmax(1).cpu(), 1, generator=generator)[:, 0]
        return F.cross_entropy(values.float(), drawn.to(values.device), reduction="sum")
    noise = torch.randn(values.shape, generator=generator).to(values)
    norm = values.detach().flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, *[1] * (values.ndim - 1))
    return (values * noise / norm).sum()


def gives_logits(model: nn.Module, output: Any) -> bool:
    """Whether an output is class logits (batch, classes)."""
    return isinstance(output, torch.Tensor) and output.ndim == 2 and output.shape[1] > 1 and getattr(model, "num_classes", 1) != 0


def _joined(output: Any) -> torch.Tensor:
    leaves = tensors_in(output)
    return leaves[0] if len(leaves) == 1 else torch.cat([leaf.flatten(1) for leaf in leaves], 1)

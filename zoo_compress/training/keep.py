"""Training that keeps what packed weights have in common: removed weights stay removed, shared values stay shared.

Han et al. 2016, Deep Compression: section 2 (retraining the weights left) and section 3.3 (centroids learn from the sum of gradients).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..structure.packed import Packing
from ..surgery.masks import mask_, masks_of
from ..surgery.origin import packed_of
from ..surgery.packing import assignments

_logger = logging.getLogger(__name__)


class Keeper:
    """Keeps zeros and shared values of a model's weights while an optimizer changes them. Works by hooks on the weights and the optimizer.

    Removed weights have no gradient and are zero after every step, whatever weight decay, momentum or another optimizer's idea would
    make of them. All weights of a cluster get the sum of their gradients, and their mean after every step.

    Args:
        model: The model, whose weights are as its record says now. Weights that are not (a new classifier's) train freely.
        packed: Parameter → what to keep; the model's record unless given.
    """

    def __init__(self, model: nn.Module, packed: Mapping[str, Packing] | None = None) -> None:
        parameters = dict(model.named_parameters())
        packed = {name: packing for name, packing in (packed_of(model) if packed is None else packed).items() if name in parameters}
        self.masks = masks_of(model, [name for name, packing in packed.items() if packing.mask])
        self.clusters: dict[str, tuple[Tensor, int]] = {}
        for name, packing in packed.items():
            if packing.bits is None:
                continue
            found = assignments(parameters[name].detach(), packing)
            if found is None:
                _logger.warning(f"{name} has more than the {2**packing.bits} values of {packing.bits} bits: it trains freely")
            else:
                self.clusters[name] = found, int(found.max()) + 1
        self._model = model
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> Keeper:
        """Begin: `optimizer` is the one that trains the model."""
        for name, parameter in self._model.named_parameters():
            if (name in self.masks or name in self.clusters) and parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._hook(name)))
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.restore_(self._model)))
        return self

    def remove(self) -> None:
        """End."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def restore_(self, model: nn.Module) -> None:
        """Give the weights of a model, the trained one or an average of it, the zeros and shared values, in place."""
        parameters = dict(model.named_parameters())
        for name, (index, count) in self.clusters.items():
            weight = parameters[name]
            index = index.to(weight.device)
            members = torch.bincount(index.flatten() + 1, minlength=count + 1).clamp(min=1)
            weight.copy_((_sums(weight, index, count) / members)[index + 1])
        for name, mask in self.masks.items():
            mask_(parameters[name], mask)

    def _hook(self, name: str) -> Any:
        def change(gradient: Tensor) -> Tensor:
            if name in self.clusters:
                index, count = self.clusters[name]
                index = index.to(gradient.device)
                gradient = _sums(gradient, index, count).to(gradient.dtype)[index + 1]
            if name in self.masks:
                gradient = torch.where(self.masks[name].to(gradient.device), gradient, 0)
            return gradient

        return change


def keep_packed(model: nn.Module, optimizer: torch.optim.Optimizer) -> Keeper:
    """Let training keep the zeros and shared values of a sparse, clustered, binary or ternary model, in a loop of your own.

    Recipes and `zoo_compress.training` do this by themselves.

    Args:
        model: The model.
        optimizer: Any optimizer of its parameters.

    Returns:
        What keeps them: `restore_(average)` before an average of the weights is used, `remove()` to end it.
    """
    return Keeper(model).attach(optimizer)


def _sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Sum of the elements of each cluster (count + 1,), those removed first, in double precision."""
    sums = torch.zeros(count + 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, index.flatten() + 1, values.detach().flatten().double())

"""Training that keeps what packed weights have in common: removed weights stay removed, shared values stay shared.

Han et al. 2016, Deep Compression: section 2 (retraining the weights left) and section 3.3 (centroids learn from the sum of gradients).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import CompressError
from ..structure.packed import Packing
from ..surgery.masks import Masks, mask_, masks_of
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
        self._model = model
        self.masks = masks_of(model, [name for name, packing in packed.items() if packing.mask])
        self.clusters: dict[str, _Clusters] = {}
        for name, packing in packed.items():
            if packing.bits is None:
                continue
            found = assignments(parameters[name].detach(), packing)
            if found is None:
                _logger.warning(f"{name} has more than the {2**packing.bits} values of {packing.bits} bits: it trains freely")
            else:
                self.clusters[name] = _Clusters.of(found)
        self._handles: list[RemovableHandle] = []

    @property
    def masks(self) -> Masks:
        """What is left of each parameter that has a mask."""
        return self._masks

    @masks.setter
    def masks(self, masks: Masks) -> None:
        parameters = dict(self._model.named_parameters())
        self._masks = {name: mask.to(parameters[name].device) for name, mask in masks.items()}
        self._removed = {name: ~mask for name, mask in self._masks.items()}

    def attach(self, optimizer: torch.optim.Optimizer) -> Keeper:
        """Begin: `optimizer` is the one that trains the model."""
        for name, parameter in self._model.named_parameters():
            if (name in self.masks or name in self.clusters) and parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._hook(name)))
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self._after_step()))
        return self

    def remove(self) -> None:
        """End."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def restore_(self, model: nn.Module) -> None:
        """Give the weights of a model, the trained one or an average of it, the zeros and shared values, in place."""
        parameters = dict(unwrap_model(model).named_parameters())
        for name, clusters in self.clusters.items():
            parameters[name].copy_(clusters.means(parameters[name]))
        for name, mask in self.masks.items():
            mask_(parameters[name], mask)

    @torch.no_grad()
    def _after_step(self) -> None:
        parameters = dict(self._model.named_parameters())
        for name, clusters in self.clusters.items():
            parameters[name].copy_(clusters.means(parameters[name]))
        for name, removed in self._removed.items():
            parameters[name].masked_fill_(removed, 0)

    def _hook(self, name: str) -> Any:
        def change(gradient: Tensor) -> Tensor:
            if name in self.clusters:
                gradient = self.clusters[name].sums(gradient)
            if name in self._removed:
                gradient = gradient.masked_fill(self._removed[name], 0)
            return gradient

        return change


@dataclass(frozen=True)
class _Clusters:
    """Who shares values with whom.

    Attributes:
        index: Cluster of each element of the parameter (n,), 0 for those that are removed.
        members: Elements of each cluster.
    """

    index: Tensor
    members: Tensor

    @classmethod
    def of(cls, found: Tensor) -> _Clusters:
        index = found.flatten() + 1
        return cls(index, torch.bincount(index))

    def sums(self, values: Tensor) -> Tensor:
        """Each element's cluster's sum of a tensor of the parameter's shape."""
        return self._total(values)[self.index].view(values.shape).to(values.dtype)

    def means(self, values: Tensor) -> Tensor:
        """The same for means."""
        return (self._total(values) / self.members.clamp(min=1)).to(values.dtype)[self.index].view(values.shape)

    def _total(self, values: Tensor) -> Tensor:
        # In double precision, so that the mean of equal numbers is that number.
        total = torch.zeros(len(self.members), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.index, values.detach().flatten().double())


def keep_packed(model: nn.Module, optimizer: torch.optim.Optimizer) -> Keeper:
    """Let training keep the zeros and shared values of a sparse, clustered, binary or ternary model, in a loop of your own.

    Recipes and `zoo_compress.training` do this by themselves.

    Args:
        model: The model, or what wraps it for training (`torch.compile`, `DistributedDataParallel`).
        optimizer: Any optimizer of its parameters.

    Returns:
        What keeps them: `restore_(average)` before an average of the weights is used, `remove()` to end it.

    Raises:
        CompressError: If the model says of no weight that it is removed or shared.
    """
    model = unwrap_model(model)  # wrappers have other names for its parameters
    packed = packed_of(model)
    if not packed:
        raise CompressError(
            f"keep_packed: expected a model that sparsify, cluster or quantize made of one of timm's, found {type(model).__name__} without "
            "a record of removed or shared weights"
        )
    if not packed.keys() & {name for name, _ in model.named_parameters()}:
        raise CompressError(
            f"keep_packed: expected a model with the weights its record speaks of, such as {next(iter(packed))!r}, found "
            f"{type(model).__name__} without; pass the model that it wraps"
        )
    return Keeper(model, packed).attach(optimizer)

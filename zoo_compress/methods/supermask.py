"""Supermasks: a good subnetwork of a random network is found by training scores; not one weight is trained.

Ramanujan et al. 2020, What's Hidden in a Randomly Weighted Neural Network? (edge-popup).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..structure.packed import Packing
from ..surgery.masks import best, mask_
from ..surgery.modules import statistics
from ..surgery.origin import refuse_packed, stamp_packed
from ..surgery.weights import layer_weights, plain_weights_, through
from ..training.task import MethodConfig, MethodTask


class SupermaskConfig(MethodConfig):
    """Training of scores for the weights of convolutions and linear layers, all parameters as they are. Ends with a sparse network.

    Batch normalisation is without scale and shift, as in the paper: blocks that begin switched off could not be found. For the same
    reason weights of a layer that begin as zeros, as some classifiers' do, are drawn as He et al. 2015 say.

    Attributes:
        density: fraction of each layer's weights that the network computes with, those of the highest scores.
        signed: give the weights of a layer one magnitude, that of He et al. 2015 for so many inputs, and their own signs (section 3.3);
            else they stay as they are.
    """

    kind: Literal["supermask"] = "supermask"
    density: Annotated[float, Field(gt=0, lt=1)] = 0.5
    signed: bool = True

    @property
    def removes(self) -> bool:
        return True

    def wrap(self, model: nn.Module) -> nn.Module:
        refuse_packed(model, "supermask")
        weights = layer_weights(model)
        parts = {name: _Subnetwork(weight, self.density) for name, weight in weights.items()}
        model.requires_grad_(False)
        with torch.no_grad():
            for path in statistics(model):
                for key, parameter in model.get_submodule(path).named_parameters(recurse=False):
                    parameter.fill_(float(key == "weight"))
        for name, weight in weights.items():
            magnitude = math.sqrt(2 / weight[0].numel())
            with torch.no_grad():
                if not weight.any():
                    weight.normal_(0, magnitude)
                if self.signed:
                    weight.copy_(weight.sign() * magnitude)
            path, _, key = name.rpartition(".")
            parametrize.register_parametrization(model.get_submodule(path), key, parts[name], unsafe=True)
        return model

    def task(self, task: TrainingTask, seed: int) -> MethodTask:
        return MethodTask(task, nn.Module)

    def finish(self, net: Any, images: Iterable[object], held_out: Iterable[object] = ()) -> nn.Module:
        masks = {
            path: module.parametrizations.weight[0].mask()
            for path, module in net.named_modules()
            if parametrize.is_parametrized(module, "weight")
        }
        names = plain_weights_(net)
        for name, mask in zip(names, masks.values(), strict=True):
            mask_(net.get_parameter(name), mask)
        net.requires_grad_(True)
        stamp_packed(net, "sparse", dict.fromkeys(names, Packing(mask=True)))
        return net


class _Subnetwork(nn.Module):
    """What torch's parametrization puts between a weight and its layer: the part of the weight whose scores are the highest."""

    def __init__(self, weight: Tensor, density: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.empty_like(weight, memory_format=torch.contiguous_format))
        nn.init.kaiming_uniform_(self.scores.view(len(weight), -1), a=math.sqrt(5))
        self.count = max(1, round(density * weight.numel()))

    def mask(self) -> Tensor:
        """Booleans of the weight's shape."""
        return best(self.scores.detach().abs().flatten(), self.count).view(self.scores.shape)

    def forward(self, weight: Tensor) -> Tensor:
        # The gradient of the mask is that of the scores behind it (section 3.1).
        return weight * through(self.scores.abs(), self.mask().to(weight.dtype))

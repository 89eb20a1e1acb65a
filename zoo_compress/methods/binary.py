"""Weights of one bit, trained as such: the network computes with their signs, and the gradient goes straight through to real numbers.

Courbariaux et al. 2015, BinaryConnect; one scale a layer as in Rastegari et al. 2016, XNOR-Net, section 3.1. With zero as a third value:
Li & Liu 2016, Ternary Weight Networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import CompressError
from ..structure.packed import Packing
from ..surgery.modules import copied, takes_model
from ..surgery.origin import refuse_packed, stamp_packed
from ..surgery.weights import check_finite, ends, layer_weights, plain_weights_, through
from ..training.task import MethodConfig, MethodTask

THRESHOLD = 0.7
"""Of ternary weights, in mean magnitudes: what is below is zero (Li & Liu 2016, equation 6)."""


def binary_values(weight: Tensor) -> Tensor:
    """-a or a for each weight by its sign, with a the mean magnitude: the nearest such tensor (Rastegari et al. 2016, equation 6)."""
    scale = weight.abs().mean()
    return torch.where(weight < 0, -scale, scale)


def ternary_values(weight: Tensor) -> Tensor:
    """-a, 0 or a for each weight: 0 below 0.7 mean magnitudes, with a the mean magnitude of the others (Li & Liu 2016, section 2.3)."""
    large = weight.abs() > THRESHOLD * weight.abs().mean()
    # The sum and the count of a large layer are beyond what half precision holds.
    total = (weight.abs() * large).sum(dtype=torch.promote_types(weight.dtype, torch.float32))
    scale = (total / large.sum().clamp(min=1)).to(weight.dtype)
    return torch.where(large, torch.where(weight < 0, -scale, scale), torch.zeros_like(weight))


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Packing]] = {
    "binary": (binary_values, Packing(bits=1)),
    "ternary": (ternary_values, Packing(mask=True, bits=1)),
}


@takes_model
def quantize(model: nn.Module, kind: str = "binary", *, exclude: Iterable[str] | None = None) -> nn.Module:
    """A copy of a model whose weights have the two or three values nearest to them. Without training, that is not a network any more.

    Args:
        model: The model. It is not changed.
        kind: `binary`, -a and a in each layer, or `ternary`, with 0.
        exclude: Patterns of names of weights to leave as they are; None leaves the first and the last layer, as the field does.

    Returns:
        A new model, `<architecture>__binary` or `__ternary`.

    Raises:
        CompressError: If there is no such kind, a pattern matches nothing, a weight is not finite, or the model is sparse or clustered.
    """
    return _settle(_wrap(copied(model), kind, exclude), kind)


class _Values(nn.Module):
    """What torch's parametrization puts between a real weight and the layer that uses it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, weight: Tensor) -> Tensor:
        return through(weight, KINDS[self.kind][0](weight.detach()))


def _wrap(model: nn.Module, kind: str, exclude: Iterable[str] | None) -> nn.Module:
    """Let a model compute with few values of its weights, in place."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise CompressError(f"kind: expected {' or '.join(KINDS)}, found {kind!r}")
    refuse_packed(model, kind)
    weights = layer_weights(model, ends(model) if exclude is None else exclude)
    for name, weight in weights.items():
        check_finite(weight, name, kind)
    chosen = {id(weight) for weight in weights.values()}
    for module in list(model.modules()):
        # Layers that share a weight all compute with its few values.
        if id(module._parameters.get("weight")) in chosen:
            parametrize.register_parametrization(module, "weight", _Values(kind), unsafe=True)
    return model


def _settle(net: nn.Module, kind: str) -> nn.Module:
    """Make the few values the weights, in place: nothing stays wrapped."""
    stamp_packed(net, kind, dict.fromkeys(plain_weights_(net), KINDS[kind][1]))
    return net


class _Config(MethodConfig):
    """Training with few values of the weights.

    Attributes:
        exclude: patterns of names of weights to leave as they are; none leaves the first and the last layer.
    """

    exclude: Annotated[tuple[str, ...], Field(strict=False)] | None = None

    def wrap(self, model: nn.Module) -> nn.Module:
        return _wrap(model, self.kind, self.exclude)

    def task(self, task: TrainingTask, seed: int) -> FewValuesTask:
        return FewValuesTask(task)

    def finish(self, net: Any, images: Iterable[object], held_out: Iterable[object] = ()) -> nn.Module:
        return _settle(net, self.kind)


class BinaryConfig(_Config):
    """Training with weights of one bit: -a and a in each layer."""

    kind: Literal["binary"] = "binary"


class TernaryConfig(_Config):
    """Training with the weights -a, 0 and a in each layer."""

    kind: Literal["ternary"] = "ternary"


class FewValuesTask(MethodTask):
    """Trains as its task does, and keeps the real numbers behind binary weights between -1 and 1 (Courbariaux et al. 2015, section 2.4).

    Beyond, they would change nothing but how long it takes them to come back.

    Args:
        task: A task of timm's, whose network `wrap` of the method's config made.
    """

    def __init__(self, task: TrainingTask) -> None:
        super().__init__(task, nn.Module)

    @torch.no_grad()
    def _clip(self) -> None:
        for module in self.net.modules():
            if parametrize.is_parametrized(module, "weight") and module.parametrizations.weight[0].kind == "binary":
                module.parametrizations.weight.original.clamp_(-1, 1)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        self._clip()
        return self.task(input, target)

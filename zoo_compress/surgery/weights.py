"""The weights that methods on single weights are about: those of convolutions and linear layers, by name."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import CompressError
from .elastic import Elastic
from .modules import refuse_wrapped


def layer_weights(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Weights of all convolutions and linear layers, each once, in the model's order.

    Args:
        model: The model.
        exclude: Patterns of parameter names to leave out, such as `layer4.*`; one alone may be given as it is.

    Raises:
        CompressError: If a pattern is none, or matches none of them, or nothing is left; or if the model is a bank of several widths, whose
            weights are trained as a whole, or compiled, or if a layer's weight is computed anew for every pass (a mask, a norm, a
            parametrization): the error says which call ends that.
    """
    if not isinstance(model, nn.Module):
        raise CompressError(f"expected a model, found {type(model).__name__}")
    refuse_wrapped(model)
    if isinstance(model, Elastic):
        raise CompressError(f"expected a network of one width, found {type(model).__name__} of several; use what its export() gives")
    refuse_computed(model)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and isinstance(module._parameters.get("weight"), nn.Parameter):
            weight = module.weight
            if id(weight) not in seen and weight.is_floating_point():
                seen.add(id(weight))
                found[f"{path}.weight" if path else "weight"] = weight  # type: ignore[assignment]
    left = dict(found)
    if not isinstance(exclude, Iterable):
        raise CompressError(f"exclude: expected patterns of parameter names such as 'fc.*', found {exclude!r}")
    for pattern in (exclude,) if isinstance(exclude, str) else exclude:
        if not isinstance(pattern, str):
            raise CompressError(f"exclude: expected patterns of parameter names such as 'fc.*', found {pattern!r}")
        matched = [name for name in found if fnmatchcase(name, pattern)]
        if not matched:
            raise CompressError(f"exclude: {pattern!r} matches none of the weights such as {next(iter(found), 'there are none')!r}")
        left = {name: weight for name, weight in left.items() if name not in matched}
    if not left:
        raise CompressError(f"{type(model).__name__}: expected weights of convolutions or linear layers, found none")
    return left


def refuse_computed(model: nn.Module) -> None:
    """Refuse convolutions and linear layers whose weight is computed anew for every pass: what a method would put there would be lost.

    Weights that this package wraps for training are its own business.

    Raises:
        CompressError: Naming the first such layer and the call that makes its weight a parameter again.
    """
    for path, module in model.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and not _is_ours(module) and (reason := computed(module, path)):
            raise CompressError(f"{path or type(module).__name__}: {reason}")


def _is_ours(module: nn.Module) -> bool:
    steps = module.parametrizations["weight"] if parametrize.is_parametrized(module, "weight") else ()  # type: ignore[index]
    return any(type(step).__module__.partition(".")[0] == __name__.partition(".")[0] for step in steps)


def computed(module: nn.Module, path: str) -> str | None:
    """By what a layer's weight is computed before every pass, and the call that ends that; None if it is a parameter or buffer.

    Args:
        module: A layer that has a weight.
        path: Its name in the model.
    """
    if "weight" in module._parameters or "weight" in module._buffers:
        return None
    if parametrize.is_parametrized(module, "weight"):
        what, call = type(module.parametrizations["weight"][-1]).__name__.lstrip("_"), "parametrize.remove_parametrizations"  # type: ignore[index]
    else:
        what, call = next(filter(None, map(_remedy, module._forward_pre_hooks.values())), ("a hook", ""))
    where = f"model.get_submodule({path!r})" if path else "model"
    name = "" if call.endswith("norm") else ", 'weight'"
    remedy = f"call torch.nn.utils.{call}({where}{name}) first" if call else "make it a parameter first"
    return f"its weight is computed by {what} before every pass; {remedy}"


def _remedy(hook: object) -> tuple[str, str] | None:
    """What a hook of torch's that computes a weight is, and what of torch.nn.utils removes it."""
    if isinstance(hook, BasePruningMethod):
        return f"the mask of {type(hook).__name__}", "prune.remove"
    if isinstance(hook, WeightNorm):
        return "weight_norm", "remove_weight_norm"
    return ("spectral_norm", "remove_spectral_norm") if isinstance(hook, SpectralNorm) else None


def check_finite(weight: Tensor, name: str, what: str) -> None:
    """Refuse a weight of which a method would make nothing but more infinities, or zeros.

    Raises:
        CompressError: If an element is infinite or no number.
    """
    if not bool(torch.isfinite(weight).all()):
        raise CompressError(f"{what}: {name!r}: expected finite weights, found others")


def classifiers(model: nn.Module) -> list[str]:
    """Names of the weights that give class logits, as the model's cfg says."""
    return _of_layers(model, "classifier")


def transposed(model: nn.Module) -> dict[str, int]:
    """Names of the weights of transposed convolutions → in how many groups: they are (inputs, outputs of a group, …)."""
    layers = {f"{path}.weight" if path else "weight": module for path, module in model.named_modules()}
    return {name: module.groups for name, module in layers.items() if isinstance(module, nn.modules.conv._ConvTransposeNd)}


def turned(tensor: Tensor, groups: int) -> Tensor:
    """What is of the shape of a transposed convolution's weight, as if it were that of one which is not, and the other way round.

    Args:
        tensor: (inputs, outputs of a group, …), or (outputs, inputs of a group, …).
        groups: In how many groups the convolution is.
    """
    return tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def ends(model: nn.Module) -> list[str]:
    """Names of the first and the last weights: those that read images and those that give logits.

    They are the ones the model's cfg names; where it names none, the first and the last in the model's order.
    """
    names = list(layer_weights(model))
    return [*(_of_layers(model, "first_conv") or names[:1]), *(classifiers(model) or names[-1:])]


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def through(source: Tensor, values: Tensor) -> Tensor:
    """Some values, whose gradient reaches another tensor as if they were that (straight-through estimator, Bengio et al. 2013).

    Args:
        source: What learns.
        values: What is computed with, of the same shape; new, and without a gradient of its own.
    """
    return _Through.apply(source, values)


@torch.no_grad()
def plain_weights_(net: nn.Module) -> list[str]:
    """Make what torch's parametrizations compute of weights the weights, in place: nothing stays wrapped.

    Returns:
        Names of the weights, in the model's order.
    """
    names = []
    for path, module in list(net.named_modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            # It was the first of its layer's parameters, and came back as the last.
            module._parameters = {"weight": module._parameters.pop("weight"), **module._parameters}
            names.append(f"{path}.weight" if path else "weight")
    return names


def _of_layers(model: nn.Module, key: str) -> list[str]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    layers = cfg.get(key) or ()
    weights = layer_weights(model)
    return [f"{layer}.weight" for layer in ([layers] if isinstance(layers, str) else layers) if f"{layer}.weight" in weights]

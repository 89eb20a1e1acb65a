"""Two layers in place of one: how they are built, what they compute, and the proof that a model runs with them as it is meant to."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..errors import CompressError, VariantError
from ..structure.factors import Factor, LayerShape
from .modules import clear_caches, copied
from .trace import analyze, default_input
from .tracer import MODEL_ERRORS
from .verify import ROUNDING, TOLERANCE, randomised, relative, run_flat


def shape_of(layer: nn.Module) -> LayerShape:
    """Shape of a linear layer or a 2d convolution without groups."""
    if isinstance(layer, nn.Linear):
        return LayerShape(layer.out_features, layer.in_features)
    assert isinstance(layer, nn.Conv2d)
    return LayerShape(layer.out_channels, layer.in_channels, tuple(map(int, layer.kernel_size)))


def unfit(layer: nn.Module) -> str | None:
    """Why a layer cannot be replaced by two, whatever the model does with it; None if it can."""
    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear if isinstance(layer, nn.Linear) else None
    if plain is None:
        return f"{type(layer).__name__} is neither a linear layer nor a 2d convolution"
    own = [name for name in ("forward", "_conv_forward") if getattr(type(layer), name, None) is not getattr(plain, name, None)]
    if own or "weight" not in layer._parameters:
        return f"{type(layer).__name__} computes something else of its weight than a {plain.__name__} does"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return "a convolution in groups" if layer.groups != layer.in_channels else "a depthwise convolution"
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    return "it has hooks" if any(hooks) else None


def pair(layer: Any, factor: Factor) -> Any:
    """Two layers of a rank that take the place of one, with random weights and, in the second, its bias.

    Args:
        layer: A linear layer or a 2d convolution that `unfit` says nothing against.
        factor: Kind and rank.

    Returns:
        A sequence of the two.
    """
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    last: dict[str, Any] = {"bias": layer.bias is not None, **like}
    if isinstance(layer, nn.Linear):
        first, second = nn.Linear(layer.in_features, factor.rank, bias=False, **like), nn.Linear(factor.rank, layer.out_features, **last)
    else:
        first, second = _convolutions(layer, factor, like, last)
    new = nn.Sequential(first, second).train(layer.training).requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        with torch.no_grad():
            second.bias.copy_(layer.bias)
        second.bias.requires_grad_(layer.bias.requires_grad)
    return new


def _convolutions(conv: Any, factor: Factor, like: dict[str, Any], last: dict[str, Any]) -> tuple[Any, Any]:
    inputs, outputs, rank = conv.in_channels, conv.out_channels, factor.rank
    whole: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "padding_mode": conv.padding_mode}
    if factor.kind == "separable":
        deep = nn.Conv2d(inputs, inputs * rank, conv.kernel_size, groups=inputs, bias=False, **whole, **like)
        return deep, nn.Conv2d(inputs * rank, outputs, 1, **last)
    if factor.kind == "spatial":

        def along(d: int) -> dict[str, Any]:
            nothing = {"stride": 1, "padding": 0, "dilation": 1}
            sides = {
                name: value if isinstance(value, str) else tuple(value[d] if i == d else nothing[name] for i in range(2))
                for name, value in whole.items()
                if name != "padding_mode"
            }
            return {**sides, "padding_mode": conv.padding_mode}

        high, wide = (conv.kernel_size[0], 1), (1, conv.kernel_size[1])
        return nn.Conv2d(inputs, rank, high, bias=False, **along(0), **like), nn.Conv2d(rank, outputs, wide, **along(1), **last)
    return (
        nn.Conv2d(inputs, rank, conv.kernel_size, bias=False, **whole, **like),
        nn.Conv2d(rank, outputs, 1, **last),
    )


def composed(factor: Factor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The weight of the one layer that computes what two do.

    Args:
        factor: What the two are.
        first: Weight of the first layer.
        second: Weight of the second.

    Returns:
        (outputs, inputs), or (outputs, inputs, height, width) for convolutions.
    """
    if first.ndim == 2:
        return second @ first
    if factor.kind == "spatial":
        return torch.einsum("orw,rch->ochw", second[:, :, 0], first[..., 0])
    if factor.kind == "separable":
        by_input = second.reshape(len(second), -1, factor.rank)
        return torch.einsum("ocm,cmhw->ochw", by_input, first.reshape(-1, factor.rank, *first.shape[2:]))
    return torch.einsum("or,rchw->ochw", second[:, :, 0, 0], first)


def replace_(model: nn.Module, factors: Mapping[str, Factor]) -> nn.Module:
    """Put two layers, with random weights, in the place of each named one, in place.

    Args:
        model: A model whose layers are not factorised yet.
        factors: Path of a layer → how, for layers the model has.

    Raises:
        VariantError: If a layer cannot be replaced so; nothing is changed or allocated then.
    """
    check(model, factors)
    for path, factor in factors.items():
        put(model, path, pair(model.get_submodule(path), factor))
    return model


def undrawn(model: nn.Module) -> AbstractContextManager[None]:
    """Within, layers may be made where a model is, whose random weights are replaced: for the caller's generators none was drawn."""
    return torch.random.fork_rng(devices={parameter.device for parameter in model.parameters() if parameter.is_cuda})


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a path."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).register_module(name, module)


def check(model: nn.Module, factors: Mapping[str, Factor]) -> None:
    """Check that a record of factors fits a base, allocating nothing.

    Raises:
        VariantError: Naming the layer, what was expected and what was found.
    """
    modules = dict(model.named_modules())
    for path, factor in factors.items():
        layer = modules.get(path)
        if layer is None or not path:
            raise VariantError(f"variant.factors[{path!r}]: {type(model).__name__} has no such layer")
        reason = unfit(layer)
        if reason is not None:
            raise VariantError(f"variant.factors[{path!r}]: expected a layer that can be two, found: {reason}")
        shape = shape_of(layer)
        if factor.kind not in shape.kinds():
            raise VariantError(f"variant.factors[{path!r}].kind: expected one of {', '.join(shape.kinds())}, found {factor.kind!r}")
        full = shape.full_rank(factor.kind)
        if factor.rank > full:
            raise VariantError(f"variant.factors[{path!r}].rank: expected at most {full}, the full rank, found {factor.rank}")


def present(model: nn.Module, factors: Mapping[str, Factor]) -> dict[str, Factor]:
    """The factors of layers that a part of the base has."""
    paths = {path for path, _ in model.named_modules()}
    return {path: factor for path, factor in factors.items() if path in paths}


def refused(model: nn.Module, factors: Mapping[str, Factor], example: torch.Tensor | None = None, seed: int = 0) -> dict[str, str]:
    """Which layers the model does not bear to be two, found by running it with them.

    Every other layer is replaced at once, by two with random weights; the model in which those layers are one, with the weight that the two
    amount to, must give the same. Any model passes whose code does no more with a layer than to call it, and others do not: those that read
    its weight or its attributes, or keep it somewhere else too. On failure halves are tried, down to single layers.

    Args:
        model: The model. It is not changed.
        factors: Path → how.
        example: A batch, where the model does not say what it takes.
        seed: Of the random weights.

    Returns:
        Path → why not, for those that cannot be.
    """
    example = default_input(model) if example is None else example
    out: dict[str, str] = {}

    def sift(paths: list[str], failure: str | None) -> None:
        if failure is None:
            return
        if len(paths) == 1:
            out[paths[0]] = failure
            return
        for half in (paths[: len(paths) // 2], paths[len(paths) // 2 :]):
            sift(half, failing(half))

    def failing(paths: Iterable[str]) -> str | None:
        return _failure(model, {path: factors[path] for path in paths}, example, seed)

    paths = list(factors)
    if paths:
        with undrawn(model):
            sift(paths, failing(paths))
            rest = [path for path in paths if path not in out]
            last = failing(rest) if out and rest else None
        if last is not None:
            raise CompressError(f"factorize: {type(model).__name__} runs with each of its layers replaced, not with all of them: {last}")
    return out


def _failure(model: nn.Module, factors: Mapping[str, Factor], example: torch.Tensor, seed: int) -> str | None:
    """What goes wrong when some layers are two; None if nothing does."""
    try:
        # Without data first: most of what goes wrong is an attribute that is not there, and shows in a moment.
        analyze(replace_(copied(model), factors), example)
    except MODEL_ERRORS as error:
        cause = error.__cause__ or error
        return f"the model asks for more of it than to be called ({' '.join(str(cause).split())[:120]})"
    change = float("inf")
    for double in (False, True):
        dense, image, _ = randomised(model, example[:1], seed, double=double)
        two = copy.deepcopy(dense)
        generator = torch.Generator().manual_seed(seed)
        for path, factor in factors.items():
            new = _random_pair(dense.get_submodule(path), factor, generator)
            with torch.no_grad():  # should the model still have the layer somewhere, it shows
                two.get_submodule(path).weight.fill_(torch.nan)  # type: ignore[operator]
            put(two, path, new)
        clear_caches(dense)
        clear_caches(two)
        change = relative(run_flat(two, image), run_flat(dense, image))
        if change < (TOLERANCE if double else ROUNDING):
            return None
    return f"with two layers in its place the model computes something else (relative change {change:.2g})"


@torch.no_grad()
def _random_pair(layer: Any, factor: Factor, generator: torch.Generator) -> nn.Module:
    """A pair with random weights, whose product the layer gets for its weight, scaled to what it was."""
    new = pair(layer, factor)
    first, second = new[0].weight, new[1].weight
    for weight in (first, second):
        weight.copy_(torch.randn(weight.shape, generator=generator))
    product = composed(factor, first, second)
    scale = layer.weight.norm() / product.norm()
    second.mul_(scale)
    layer.weight.copy_(product * scale)
    return new

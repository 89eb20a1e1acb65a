"""Growing: a model with more elements along its axes, of which the first are the model as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import WidthError
from ..structure import terms
from ..structure.layout import Layout, parse
from ..structure.widths import Group, groups
from .modules import copied, set_attribute, statistics
from .resize import check_fits
from .tracer import named_tensors


def growable(model: nn.Module, layout: Layout) -> list[Group]:
    """The groups of axes that may grow: whose order does not matter, and of whose elements no constant of the model tells apart.

    Args:
        model: The model.
        layout: Its layout.
    """
    fixed = {name for name in layout.free if layout.axes[name].ordered}
    kept = {name for names in statistics(model).values() for name in names}
    for name, buffer in model.named_buffers():
        if name not in kept and buffer.numel() > 0 and layout.moves(name):
            for d, text in enumerate(layout.params[name]):
                if len(set(terms.axes(parse(text)))) > 0 and not _is_constant(buffer, d):
                    fixed.update(map(str, terms.axes(parse(text))))
    return [group for group in groups(layout) if not fixed.intersection(group.axes)]


def _is_constant(buffer: Tensor, dim: int) -> bool:
    return bool((buffer == buffer.narrow(dim, 0, 1)).all())


def grow(model: nn.Module, layout: Layout, sizes: Mapping[str, int]) -> tuple[nn.Module, Layout]:
    """A copy of a model with larger axes. The model itself stays as it is.

    The first elements of every axis, and of each part of a concatenation, are the model's. New ones are initialised as their layer
    initialises itself (`reset_parameters`); where a layer has no way to, they are drawn from a normal distribution with the mean and
    deviation of those the tensor has. Random numbers are torch's.

    Args:
        model: The model.
        layout: Its layout.
        sizes: Axis that may grow (see `growable`) → its new size.

    Returns:
        The larger model, and its layout.

    Raises:
        WidthError: If an axis may not grow so, or the layout is of another model.
    """
    check_fits(model, layout)
    allowed = {name for group in growable(model, layout) for name in group.axes}
    for name, size in sizes.items():
        if name not in allowed or size < layout.axes[name].size:
            raise WidthError(f"axis {name!r}: expected one that may grow, to at least its size, found {size}")
    chosen = layout.sizes(sizes)
    layout.check_links(sizes)
    axes = {name: replace(axis, size=chosen[name]) for name, axis in layout.axes.items()}
    grown = replace(layout, axes=axes)
    instead: dict[int, Tensor] = {}
    for name, tensor in named_tensors(model):
        if layout.moves(name):
            shape = [terms.size(parse(dim), chosen) for dim in layout.params[name]]
            new = _like(tensor.detach(), shape)
            instead[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    bank = copied(model, instead)
    for path, term in layout.attributes.items():
        set_attribute(bank, path, terms.size(parse(term), chosen))
    for path, term in layout.scales.items():
        set_attribute(bank, path, terms.size(parse(term), chosen) ** -0.5)
    _reset(bank, {name for name in layout.params if layout.moves(name)})
    first = {name: np.arange(axis.size) for name, axis in layout.axes.items()}
    olds = dict(named_tensors(model))
    with torch.no_grad():
        for name, tensor in named_tensors(bank):
            if layout.moves(name):
                places = [torch.from_numpy(terms.index(parse(dim), grown.base_sizes, first)) for dim in layout.params[name]]
                tensor[torch.meshgrid(*places, indexing="ij")] = olds[name]
            else:
                tensor.copy_(olds[name])
    return bank, grown


def _like(tensor: Tensor, shape: list[int]) -> Tensor:
    """A larger tensor with values like those of a tensor."""
    if not tensor.is_floating_point() or tensor.numel() < 2:
        return tensor.reshape(-1)[:1].expand(shape).clone()
    values = tensor.float()
    return (values.mean() + values.std(correction=0) * torch.randn(shape, device=tensor.device)).to(tensor.dtype)


def _reset(bank: nn.Module, names: set[str]) -> None:
    """Let every layer that owns one of these tensors initialise itself, if it can."""
    for path, module in bank.named_modules():
        own = {**module._parameters, **module._buffers}
        reset = getattr(module, "reset_parameters", None)
        if callable(reset) and any((f"{path}.{key}" if path else key) in names for key in own):
            with torch.no_grad():
                reset()

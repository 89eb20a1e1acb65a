"""Sparse structure selection of groups (Huang & Wang 2018, section 3.3): a factor on each group of a convolution, and on each head.

The paper puts a factor on every group of ResNeXt's convolutions. Heads of attention are such groups of channels too (Michel et al. 2019,
Are Sixteen Heads Really Better than One?), and the layout knows both alike: an axis whose every element is several channels. The layers
that read these channels see them times the factor, and have it in their weights at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import CompressError
from ..structure import terms
from ..structure.layout import Layout, parse
from ..structure.terms import Product
from ..structure.widths import groups
from ..surgery.layers import dense_layers
from ..surgery.resize import resize
from ..surgery.trace import analyze
from .selection import Factors, SelectionConfig


@dataclass(frozen=True)
class Grouped:
    """An axis of groups.

    Attributes:
        axis: Its name in the layout.
        size: How many groups.
        readers: Path of each layer that reads the groups' channels → which group each of its inputs is of, -1 for others, (inputs,).
    """

    axis: str
    size: int
    readers: Mapping[str, np.ndarray]


class GroupsConfig(SelectionConfig):
    """Training that removes groups of convolutions and heads of attention. One of each stays."""

    kind: Literal["groups"] = "groups"

    def count(self, model: nn.Module) -> int:
        return sum(grouped.size for grouped in groups_of(model, analyze(model)))

    def attach(self, net: nn.Module, factors: Factors) -> list[RemovableHandle]:
        handles, start = [], 0
        for grouped in groups_of(net, analyze(net)):
            for path, places in grouped.readers.items():
                scale = partial(_scale, factors, start, places)
                handles.append(net.get_submodule(path).register_forward_pre_hook(scale, with_kwargs=True))
            start += grouped.size
        return handles

    def select(self, net: nn.Module, factors: Tensor) -> nn.Module:
        layout, start, kept = analyze(net), 0, {}
        for grouped in groups_of(net, layout):
            own = factors[start : start + grouped.size]
            for path, places in grouped.readers.items():
                layer: Any = net.get_submodule(path)
                layer.weight.mul_(_of_inputs(own, places, layer))
            found = np.flatnonzero((own.abs() >= self.least).cpu().numpy())
            kept[grouped.axis] = found if len(found) else np.array([int(own.abs().argmax())])
            start += grouped.size
        return resize(net, layout, kept)


def _scale(
    factors: Factors, start: int, places: np.ndarray, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Scale the first argument of a call, by position or by keyword."""
    own = _of_inputs(factors(module)[start:], places, module)
    if args:
        return (args[0] * own, *args[1:]), kwargs
    name, given = next(iter(kwargs.items()))
    return args, {**kwargs, name: given * own}


def _of_inputs(factors: Tensor, places: np.ndarray, layer: Any) -> Tensor:
    """The factor of each input of a layer, that of its group or 1: (inputs, 1, …), as its images and its weight have them."""
    index = torch.from_numpy(places).to(factors.device)
    return torch.where(index >= 0, factors[index.clamp_min(0)], 1.0).reshape(-1, *(1,) * (layer.weight.ndim - 2))


def groups_of(model: nn.Module, layout: Layout) -> list[Grouped]:
    """The axes of a model whose elements are groups of channels and can be removed one by one.

    Args:
        model: The model.
        layout: Its layout.

    Raises:
        CompressError: If it has none, with the reasons.
    """
    single = {group.axes[0] for group in groups(layout) if len(group.axes) == 1}
    layers, others = dense_layers(model, layout)
    found, refused = [], {}
    for axis in layout.axes:
        readers, reason = _readers(model, layout, axis)
        if not readers:
            continue
        wrong = next((path for path in readers if path not in layers), None)
        if axis not in single:
            reason = layout.axes[axis].frozen or "it changes only together with others"
        elif wrong is not None:
            reason = f"{wrong} reads it: {others.get(wrong, 'not a layer on its own')}"
        if reason:
            refused[axis] = reason
        else:
            found.append(Grouped(axis, layout.axes[axis].size, readers))
    if not found:
        reasons = "; ".join(f"{axis}: {reason}" for axis, reason in list(refused.items())[:3])
        raise CompressError(f"groups: {type(model).__name__} has no groups of channels that can be removed ({reasons or 'none was seen'})")
    return found


def _readers(model: nn.Module, layout: Layout, axis: str) -> tuple[dict[str, np.ndarray], str | None]:
    """The layers that read several channels of each element of an axis, and why not all that read it are such layers, if so."""
    readers, reason = {}, None
    for name in sorted(layout.trained):
        path, _, kind = name.rpartition(".")
        shape = [parse(dim) for dim in layout.params[name]]
        across = [dim for dim, term in enumerate(shape) if axis in terms.axes(term)]
        if not across or len(shape) == 1:
            continue  # a scale, shift or bias goes with what it is of
        layer = model.get_submodule(path)
        plain = isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and kind == "weight"
        if plain and across == [0]:
            continue  # it writes
        if not any(_is_slow(shape[dim], axis) for dim in across):
            reason = reason if not plain else f"{name} reads it one by one"
        elif plain and across == [1] and getattr(layer, "groups", 1) == 1:
            readers[path] = terms.labels(shape[1], layout.base_sizes, axis)
        else:
            reason = f"what {name} does with it is not known"
    return readers, reason


def _is_slow(term: terms.Term, axis: str) -> bool:
    """Whether every element of an axis that runs along a dimension is more than one position of it."""
    parts = [part for part in terms.segments(term) if axis in terms.axes(part)]
    return bool(parts) and all(isinstance(part, Product) and axis not in terms.axes(part.factors[-1]) for part in parts)

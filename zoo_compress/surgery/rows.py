"""Rows that leave a batch in the middle of a forward pass: the rest flows on through the remaining modules, smaller.

A hook on a module sees what it gives, selects rows of that and hands the selection on. That is all, and it is right where nothing else of
the batch is used later. `proof.Trial` finds out where that is so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Carrier:
    """A tensor of the batch in a tree of values, or a number: leaf number `leaf`, with `rows` rows for each sample."""

    leaf: int
    rows: int = 1


@dataclass(frozen=True)
class Boundary:
    """How rows are selected where a module ends.

    Attributes:
        carriers: Tensors of its output that carry the batch.
    """

    carriers: tuple[Carrier, ...]


class Stop(Exception):
    """Nothing further needs to run."""


class Visitor:
    """Something that follows a forward pass and is called wherever a `Tap` sits."""

    def at(self, index: int, output: Any) -> Any:
        """Look at a module's output; what is returned replaces it, unless it is None."""
        raise NotImplementedError


class _State(threading.local):
    visitor: Visitor | None = None


_state = _State()


class Tap:
    """Forward hook that calls the visitor of the forward pass, if there is one. Knows no model, so copies of a model can share it.

    Args:
        index: Which of the model's taps it is.
    """

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return None if _state.visitor is None else _state.visitor.at(self.index, output)


def visiting() -> bool:
    """Whether a forward pass of this thread is being followed."""
    return _state.visitor is not None


@contextmanager
def visited(visitor: Visitor | None) -> Iterator[None]:
    """Within, this thread's forward passes are followed by a visitor, or by none."""
    before, _state.visitor = _state.visitor, visitor
    try:
        yield
    finally:
        _state.visitor = before


def set_taps(model: nn.Module, places: Sequence[str]) -> None:
    """Put taps on the modules of these names, numbered in this order, and on no others."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Tap)]:
            del module._forward_hooks[key]
    for i, place in enumerate(places):
        model.get_submodule(place).register_forward_hook(Tap(i))


def select(output: Any, boundary: Boundary, stay: torch.Tensor) -> Any:
    """A module's output with the rows of the samples that stay.

    Args:
        output: What the module gave: a tensor, or a tree of them.
        boundary: Where the batch is in it.
        stay: Indices of the samples that stay, (samples,).
    """
    leaves, tree = tree_flatten(output)
    for carrier in boundary.carriers:
        leaf = leaves[carrier.leaf]
        leaves[carrier.leaf] = _rows(leaf, stay, carrier.rows) if isinstance(leaf, torch.Tensor) else len(stay) * carrier.rows
    return tree_unflatten(leaves, tree)


def _rows(tensor: torch.Tensor, stay: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of the samples that stay; `rows` consecutive ones belong to each sample."""
    if rows == 1:
        return tensor.index_select(0, stay)
    return tensor.unflatten(0, (-1, rows)).index_select(0, stay).flatten(0, 1)


def run(model: Callable[..., Any], visitor: Visitor | None, *args: Any, **kwargs: Any) -> Any:
    """Call a model followed by a visitor. None if the visitor stopped it."""
    with visited(visitor):
        try:
            return model(*args, **kwargs)
        except Stop:
            return None

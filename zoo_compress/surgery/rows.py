"""Rows that leave a batch in the middle of a forward pass: the rest flows on through the remaining modules, smaller.

A hook on a module sees what it gives, selects rows of that and hands the selection on. That is all, where nothing else of the batch is
alive. Where something is (what a later block adds, a second branch, the batch size as a number), it is in local variables of the forward
methods in progress: tensors get other contents in place, numbers are replaced. `proof.Trial` finds out which, and proves that it is right.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

_NOT_THE_MODEL = {nn.Module.__call__.__code__.co_filename, __file__}


@dataclass(frozen=True)
class Carrier:
    """A tensor of the batch in a tree of values, or a number: leaf number `leaf`, with `rows` rows for each sample."""

    leaf: int
    rows: int = 1


@dataclass(frozen=True)
class Alive:
    """A local variable of a forward method in progress that holds a tensor of the batch, or a size of one.

    Attributes:
        code: Of the method.
        nth: Which of the calls in progress that run this code, from the outermost.
        name: Of the variable.
        carrier: Where in it.
    """

    code: CodeType
    nth: int
    name: str
    carrier: Carrier


@dataclass(frozen=True)
class Boundary:
    """How rows are selected where a module ends.

    Attributes:
        carriers: Tensors of its output that carry the batch.
        alive: What else does, in the calls in progress.
    """

    carriers: tuple[Carrier, ...]
    alive: tuple[Alive, ...] = ()


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
    """A module's output with the rows of the samples that stay, and the same for the tensors alive next to it, in place.

    Args:
        output: What the module gave: a tensor, or a tree of them.
        boundary: Where the batch is in it.
        stay: Indices of the samples that stay, (samples,). Called from a hook: the calls in progress are looked through from there.
    """
    leaves, tree = tree_flatten(output)
    for carrier in boundary.carriers:
        leaves[carrier.leaf] = _rows(leaves[carrier.leaf], stay, carrier.rows)
    selected = tree_unflatten(leaves, tree)
    if boundary.alive:
        _shrink(boundary.alive, stay)
    return selected


def _shrink(variables: Sequence[Alive], stay: torch.Tensor) -> None:
    """Leave only the rows of samples that stay in what local variables hold."""
    frames = {(frame.f_code, nth): frame for frame, nth in calls()}
    shrunk = set()
    for alive in variables:
        frame, carrier = frames[alive.code, alive.nth], alive.carrier
        value = frame.f_locals[alive.name]
        leaf = leaves_of(value)[carrier.leaf]
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in shrunk:  # one tensor may be in several variables
                shrunk.add(id(leaf))
                leaf.data = _rows(leaf, stay, carrier.rows)
        elif isinstance(value, int):
            _assign(frame, alive.name, len(stay) * carrier.rows)
        else:
            _assign(frame, alive.name, type(value)([*value[: carrier.leaf], len(stay) * carrier.rows, *value[carrier.leaf + 1 :]]))


def leaves_of(value: Any) -> list[Any]:
    """The leaves of a local variable's value; the numbers of a shape, too."""
    return list(value) if isinstance(value, torch.Size) else tree_leaves(value)


def _assign(frame: FrameType, name: str, value: Any) -> None:
    """Give a local variable of a call in progress another value, as debuggers do."""
    frame.f_locals[name] = value
    if sys.version_info < (3, 13):  # from there on, f_locals writes through (PEP 667)
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def _rows(tensor: torch.Tensor, stay: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of the samples that stay; `rows` consecutive ones belong to each sample."""
    if rows == 1:
        return tensor.index_select(0, stay)
    return tensor.unflatten(0, (-1, rows)).index_select(0, stay).flatten(0, 1)


def calls() -> list[tuple[FrameType, int]]:
    """Forward methods in progress around the tap that is being visited, the outermost first, with which call of the same code each is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not Tap.__call__.__code__:
        frame = frame.f_back
    frames = []
    while frame is not None and frame.f_code is not run.__code__:
        if frame.f_code.co_filename not in _NOT_THE_MODEL:
            frames.append(frame)
        frame = frame.f_back
    seen: Counter[CodeType] = Counter()
    found = []
    for frame in reversed(frames):
        found.append((frame, seen[frame.f_code]))
        seen[frame.f_code] += 1
    return found


def run(model: Callable[..., Any], visitor: Visitor | None, *args: Any, **kwargs: Any) -> Any:
    """Call a model followed by a visitor. None if the visitor stopped it. Calls outside of this one are not looked at by `select`."""
    with visited(visitor):
        try:
            return model(*args, **kwargs)
        except Stop:
            return None

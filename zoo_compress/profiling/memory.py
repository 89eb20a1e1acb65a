"""Memory of a forward pass, counted rather than sampled: the same model always needs the same."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def weight_memory(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones counted once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def activation_memory(model: nn.Module, image: torch.Tensor) -> int:
    """Most bytes that the tensors of one forward pass, its input included, take up at one time. Gradients are not recorded.

    Every storage counts from the operation that makes it until nothing refers to it. Not counted are parameters and buffers, what a
    kernel uses while it runs (oneDNN's scratchpads), and what the allocator keeps without using it.
    """
    with torch.no_grad(), _Live(model) as live:
        live.add(image)
        model(image)
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._bytes = 0
        self._known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._remove, key, size)
            self._bytes += size
            self.peak = max(self.peak, self._bytes)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out

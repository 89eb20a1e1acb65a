"""Networks that end early for good: without the modules that are not needed until there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..structure.exits import Exit
from .kernels import Kernels
from .leaving import Until
from .modules import eval_copy
from .trace import default_input
from .tracer import named_tensors


def truncate_(net: nn.Module, exit: Exit, heads: str) -> None:
    """Drop, in place, the modules that a forward pass up to an exit does not need: nothing of theirs runs or is read.

    Args:
        net: A network with exits.
        exit: Where it ends from now on.
        heads: Name of the module that holds the heads.
    """
    clone: Any = eval_copy(net, "meta")
    paths = {id(tensor): name.rpartition(".")[0] for name, tensor in named_tensors(clone)}
    ran: set[str] = set()

    def enter(path: str) -> Callable[..., None]:
        return lambda module, args: ran.add(path)

    for path, module in clone.named_modules():
        module.register_forward_pre_hook(enter(path))
    with Kernels(), _Reads() as reads, torch.no_grad():
        clone.forward_followed(Until((exit,), None, 0), default_input(net))
    ran |= {path for key, path in paths.items() if key in reads.seen}
    needed = {prefix for path in ran for prefix in _prefixes(path)}
    for path, module in list(net.named_modules()):
        parent, _, name = path.rpartition(".")
        unused = path not in needed and path.partition(".")[0] != heads and (not parent or parent in needed)
        if path and unused and any(True for _ in (*module.parameters(), *module.buffers())):
            net.get_submodule(parent).register_module(name, nn.Identity())


class _Reads(TorchDispatchMode):
    """Which tensors operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        return func(*args, **(kwargs or {}))


def _prefixes(path: str) -> list[str]:
    """A module and all that hold it."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]

"""Building a model without drawing the random numbers that its weights are about to replace: most of the time a large one takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Methods of tensors, and functions of torch.nn.init that ask modes before they call these.
_RANDOM = frozenset(
    {"normal_", "uniform_", "exponential_", "cauchy_", "log_normal_", "geometric_", "bernoulli_", "random_"} | {"kaiming_uniform_"}
)
# What initialisers go on to do with the numbers drawn: a truncated normal distribution takes five passes over them.
_AFTERWARDS = frozenset({"erfinv_", "mul_", "div_", "add_", "sub_", "clamp_", "clip_"})


class skip_init(TorchFunctionMode):
    """Within, parameters that a model would fill with random numbers are zero.

    Only for models whose parameters are all loaded afterwards. Buffers, and parameters filled by way of `.data`, are filled as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._skipped: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        tensor = args[0] if args else (kwargs or {}).get("tensor")
        if isinstance(tensor, nn.Parameter) and (name in _RANDOM or (name in _AFTERWARDS and id(tensor) in self._skipped)):
            if id(tensor) not in self._skipped:
                self._skipped[id(tensor)] = tensor
                tensor.detach().zero_()
            return tensor
        return func(*args, **(kwargs or {}))

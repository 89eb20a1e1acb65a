"""Building what a file asks for without giving it more memory than the file's own size justifies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import VariantError

# A base is larger than what was pruned from it: keeping a tenth of both sides of every matrix leaves a hundredth.
ELEMENTS_PER_ELEMENT = 1000
CALLS_PER_TENSOR = 20
ELEMENTS_PER_BASE = 16
"""Without weights: what a record may ask for, against the architecture as timm makes it. Twice the width and depth is eight times."""
# What any model may take: no machine feels 64 MiB or a second.
FREE_ELEMENTS = 2**24
FREE_CALLS = 1000

_SIZED = frozenset({"empty", "zeros", "ones", "rand", "randn", "full", "empty_strided", "eye", "randint", "randperm"})
_RANGES = frozenset({"arange", "linspace", "logspace"})


def allowed(state: Mapping[str, Tensor], per_element: int = ELEMENTS_PER_ELEMENT) -> int:
    """Elements that a model with such a checkpoint may have."""
    return FREE_ELEMENTS + per_element * sum(tensor.numel() for tensor in state.values())


class allowance(TorchFunctionMode):
    """Within, tensors may be made as long as they are not out of all proportion to a checkpoint's; the one too many is not allocated.

    Args:
        state: The checkpoint's tensors.
        where: Where they come from, for the message.
        per_element: How many elements there may be for each of theirs.

    Raises:
        VariantError: Within the context, before the allocation.
    """

    def __init__(self, state: Mapping[str, Tensor], where: str, per_element: int = ELEMENTS_PER_ELEMENT) -> None:
        super().__init__()
        self._per_element = per_element
        self._elements = allowed(state, per_element)
        self._calls = FREE_CALLS + CALLS_PER_TENSOR * len(state)
        self._where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SIZED or name in _RANGES:
            self._elements -= _requested(name, args, kwargs or {})
            self._calls -= 1
            if self._elements < 0 or self._calls < 0:
                raise VariantError(
                    f"{self._where}: its record asks for a model out of all proportion to its weights; expected at most "
                    f"{self._per_element} times their size"
                )
        return func(*args, **(kwargs or {}))


def _requested(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Elements a factory function is asked for."""
    if name == "arange":
        limits = [*args[:2], *(kwargs[key] for key in ("start", "end") if key in kwargs)]
        first, last = (0, limits[0]) if len(limits) == 1 else limits[:2]
        step = args[2] if len(args) > 2 else kwargs.get("step", 1)
        return math.ceil(abs((last - first) / step)) if step else 0
    if name in _RANGES:
        return int(kwargs["steps"] if "steps" in kwargs else args[2])
    if name == "eye":
        rows, columns = [*args[:2], *(kwargs[key] for key in ("n", "m") if key in kwargs), *args[:1]][:2]
        return abs(rows * columns)
    size = kwargs.get("size", next((arg for arg in args if isinstance(arg, (tuple, list))), None))
    return abs(math.prod(size if size is not None else [arg for arg in args if isinstance(arg, int)]))

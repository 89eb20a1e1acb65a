"""Numbers that a model's code computes from widths where no trace can follow: `1.0 / c`, `range(c)`, `math.log2(c)`.

Python takes an operand that is an `int` for its value there, whatever its class. So the model runs once more, at other widths and without
tags, and every number that the trace took for a constant has to be the same again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..structure.layout import Layout
from ..structure.widths import Group, groups
from .kernels import Kernels
from .modules import eval_copy, every_output
from .resize import changed_copy
from .sizes import Computed, Size
from .tracer import MODEL_ERRORS

Call: TypeAlias = "tuple[str, tuple[float | None, ...]]"
"""A torch function that the model called, by name, and the numbers it was given: None for those whose origin is known."""


def leaves(value: Any) -> Iterator[Any]:
    """Numbers and tensors among a function's arguments, and in what holds several of them."""
    if isinstance(value, (int, float, torch.Tensor)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(tuple(value.values()))
    elif isinstance(value, slice):
        yield from leaves((value.start, value.stop, value.step))


def call(function: Any, given: Iterable[Any]) -> Call:
    """What is remembered of a call of a torch function."""
    numbers = (number for number in given if isinstance(number, (int, float)))
    known = tuple(None if isinstance(number, (Size, Computed)) else number for number in numbers)
    return getattr(function, "__name__", str(function)), known


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(call(func, leaves((args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def freeze_unseen(model: nn.Module, layout: Layout, calls: Sequence[Call], example: torch.Tensor) -> Layout:
    """The layout, with those axes frozen that change a number which the trace took for a constant.

    Args:
        model: The analysed model.
        layout: What the trace found.
        calls: The torch functions that the model called while it was traced.
        example: A batch; only its shape and dtype are used.
    """
    twin = eval_copy(model, "meta")
    image = torch.empty(example.shape, dtype=example.dtype, device="meta")
    expected = [call for call in calls if call[1]]

    def difference(chosen: Sequence[Group]) -> str | None:
        return _difference(expected, twin, layout, chosen, image)

    checked = False
    while (together := groups(layout)) and (why := difference(together)) is not None:
        if not checked and difference(()) is not None:
            return layout  # this model does not do twice the same; nothing can be compared
        checked = True
        low, high = 0, len(together)
        while high - low > 1:
            middle = (low + high) // 2
            found = difference(together[:middle])
            low, high, why = (low, middle, found) if found is not None else (middle, high, why)
        held = together[low].axes
        layout = replace(layout, axes={k: replace(axis, frozen=why) if k in held else axis for k, axis in layout.axes.items()})
    return layout


def _difference(expected: Sequence[Call], twin: nn.Module, layout: Layout, chosen: Sequence[Group], image: torch.Tensor) -> str | None:
    """What a model does otherwise, in words, when some groups of axes have other sizes; each another fraction, so that ratios change."""
    widths = {name: size for i, group in enumerate(chosen) for name, size in group.at(_step(group, i)).items()}
    recorder = _Recorder()
    resized = changed_copy(twin, layout, widths)
    try:
        with torch.no_grad(), Kernels(), recorder, every_output(resized):
            resized(image)
    except MODEL_ERRORS as error:
        return f"the model does not run at another width ({type(error).__name__}: {error})"
    found = [call for call in recorder.calls if call[1]]
    for (name, numbers), (other, others) in zip(expected, found, strict=False):
        if name != other:
            return f"at another width the model calls {other} where it called {name}"
        for before, after in zip(numbers, others, strict=False):
            if before is not None and before != after and before == before:
                return f"{name} is given {before:g}, which the model's code computes from it"
        if len(numbers) != len(others):
            return f"at another width {name} is given {len(others)} numbers, not {len(numbers)}"
    return None if len(expected) == len(found) else f"at another width the model calls {len(found)} torch functions, not {len(expected)}"


def _step(group: Group, i: int) -> int:
    """Another width for a group: even where the whole is odd and the other way round, since a greatest common divisor may else stay."""
    step = max(1, int(group.steps * (0.4 + 0.4 * (i * 0.618 % 1))))
    return step + 1 if step < group.steps and (group.steps - step) % 2 == 0 else step

"""Which activations are zero wherever an element is removed, if all that is stored for that element is zero.

Over those a sum adds nothing, so that it may stay in the zeroing proof; over others (a sigmoid of zero is a half) it may not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..structure import unify as u
from ..structure.terms import Term
from .tracer import Tracer

_KEEPING = frozenset(
    {"relu", "leaky_relu", "elu", "gelu", "silu", "mish", "tanh", "hardswish", "abs", "neg", "sqrt", "sin", "erf", "hardtanh", "sign"}
    | {"square", "clone", "detach", "alias", "contiguous", "_to_copy", "view", "_unsafe_view", "reshape", "_reshape_alias", "permute"}
    | {"transpose", "t", "squeeze", "unsqueeze", "slice", "select", "split", "split_with_sizes", "unsafe_split", "chunk", "unbind"}
    | {"cat", "stack", "flip", "roll", "sum", "mean", "amax", "amin", "max_pool2d_with_indices", "avg_pool2d", "pixel_shuffle"}
    | {"_adaptive_avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "as_strided", "unfold", "diagonal"}
)
"""What makes zeros of zeros alone."""

_ADDING = frozenset({"add", "sub", "rsub", "maximum", "minimum"})
_PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})
_NORMS = ("batch_norm", "layer_norm", "group_norm")


def mark(tensor: torch.Tensor) -> None:
    """All that a tensor holds for an element that is removed is zero."""
    tensor._zc_vanishes = True  # type: ignore[attr-defined]


def vanishes(t: Tracer, tensor: torch.Tensor) -> bool:
    """Whether a tensor is known to be zero wherever an element is removed that runs along it."""
    return hasattr(tensor, "_zc_vanishes") or t.is_constant(tensor)


def follow(t: Tracer, name: str, operands: Sequence[torch.Tensor], numbers: bool, outputs: Sequence[torch.Tensor]) -> None:
    """Mark what an operation gives, if it is zero where its operands are.

    Args:
        t: The tracer, which knows the outputs' dimensions already.
        name: The operation.
        operands: Its tensors.
        numbers: Whether a number is among the other operands.
        outputs: What it gave.
    """
    name = name.removesuffix("_")
    if not operands or not outputs:
        return
    out = outputs[0]
    if name in _KEEPING:
        found = all(vanishes(t, tensor) for tensor in operands)
    elif name in ("expand", "repeat"):
        found = vanishes(t, operands[0]) and _carries(t, operands[0], out)
    elif name in _ADDING:
        found = not (numbers and len(operands) < 2) and all(vanishes(t, tensor) and _carries(t, tensor, out) for tensor in operands)
    elif name in ("mul", "div"):
        found = any(vanishes(t, tensor) and _carries(t, tensor, out) for tensor in (operands[:1] if name == "div" else operands))
    elif name in _PRODUCTS and len(operands) >= 2:
        a, b = operands[-2:]
        added = all(vanishes(t, tensor) and _carries(t, tensor, out) for tensor in operands[:-2])
        *outer, rows, _ = t.dims(a)
        found = added and (vanishes(t, a) or not any(map(u.is_free, (*outer, rows)))) and (vanishes(t, b) or not u.is_free(t.dims(b)[-1]))
    elif "convolution" in name:
        found = all(vanishes(t, tensor) for tensor in operands[1:])
    else:
        found = any(norm in name for norm in _NORMS) and len(operands) > 1 and all(vanishes(t, tensor) for tensor in operands[1:])
    if found:
        for tensor in outputs:
            mark(tensor)


def _carries(t: Tracer, tensor: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether every axis that runs along an output runs along the operand too: none was broadcast."""
    dims: list[Term] = t.dims(out)
    missing = len(dims) - tensor.ndim
    along = [i >= missing and int(tensor.shape[i - missing]) == int(out.shape[i]) for i in range(len(dims))]
    return all(here or isinstance(u.resolve(term), int) for here, term in zip(along, dims, strict=True))

"""What operations give on tensors without data, computed once for equal shapes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Kernels(TorchDispatchMode):
    """Runs ATen operations, each once for arguments of the same shapes. As a mode, those within it; as a function, one.

    Without data, an operation only has to find the shape of its result. Where torch does that in Python (normalisations, activations) it
    takes milliseconds, and networks repeat their blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self(func, args, kwargs or {})

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _makes_new_tensors(func):
            return func(*args, **kwargs)
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())))
            known = self._known.get(key)
        except _HasData:
            return func(*args, **kwargs)
        if known is not None:
            return _like(known)
        out = func(*args, **kwargs)
        if all(isinstance(t, torch.Tensor) and t.is_meta for t in (out if isinstance(out, (tuple, list)) else (out,))):
            self._known[key] = _described(out)
        return out


class _HasData(Exception):
    """A tensor that is not on the meta device: what an operation gives may depend on its values."""


@cache
def _makes_new_tensors(func: Any) -> bool:
    schema = func._schema
    return not schema.is_mutable and all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise _HasData
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    return (type(value), value) if isinstance(value, (bool, float)) else value  # True and 1.0 equal 1 and give other dtypes


def _described(out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return tuple(out.shape), out.stride(), out.dtype
    return [_described(tensor) for tensor in out]


def _like(known: Any) -> Any:
    if isinstance(known, list):
        return tuple(map(_like, known))
    shape, stride, dtype = known
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

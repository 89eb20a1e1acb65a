"""Torch functions whose arguments are sizes: where the numbers came from is known here, before they reach an operation.

A handler runs the function and ties each size it was given to the term of the dimension it describes. Sizes that no handler accounts for
freeze the axes they split (`Tracer.regroup`), so a missing entry costs prunable axes and never a wrong layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..structure import unify as u
from ..structure.terms import Term, concat, product
from .rules import attention
from .sizes import Computed, Size
from .tracer import Tracer

Handler = Callable[..., Any]
FUNCTIONS: dict[Any, Handler] = {}


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler, called as `handler(tracer, function, *args, **kwargs)`."""

    def register(handler: Handler) -> Handler:
        FUNCTIONS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _flat(sizes: Sequence[Any]) -> list[int]:
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)


@handles(torch.Tensor.shape.__get__)  # type: ignore[attr-defined]
def _shape(t: Tracer, function: Any, tensor: torch.Tensor) -> Any:
    return torch.Size([t.read_size(n, term) for n, term in zip(function(tensor), t.dims(tensor), strict=True)])


@handles(torch.Tensor.size)
def _size(t: Tracer, function: Any, tensor: torch.Tensor, dim: int | None = None) -> Any:
    shape = _shape(t, lambda x: x.shape, tensor)
    return shape if dim is None else shape[dim]


@handles(torch.Tensor.numel, torch.Tensor.nelement, torch.numel)
def _numel(t: Tracer, function: Any, tensor: torch.Tensor) -> int:
    return t.read_size(function(tensor), product(*t.dims(tensor)))


@handles(torch.Tensor.view, torch.Tensor.reshape, torch.reshape)
def _view(t: Tracer, function: Any, tensor: torch.Tensor, *sizes: Any, **named: Any) -> torch.Tensor:
    with t.sizes_known():
        out = function(tensor, *sizes, **named)
    shape = _flat(sizes) if sizes else list(named.get("shape", named.get("size", ())))
    if not any(isinstance(s, torch.dtype) for s in shape):
        for size, term in zip(shape, t.dims(out), strict=True):
            t.meet(size, term)
    return out


@handles(torch.Tensor.unflatten, torch.unflatten)
def _unflatten(t: Tracer, function: Any, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    with t.sizes_known():
        out = function(tensor, dim, sizes)
    for size, term in zip(sizes, t.dims(out)[dim % tensor.ndim :], strict=False):
        t.meet(size, term)
    return out


@handles(torch.Tensor.__len__)
def _len(t: Tracer, function: Any, tensor: torch.Tensor) -> int:
    t.keep(t.dims(tensor)[:1], "the model's code asks for it with len(), whose answer cannot be followed; read shape[0]")
    return function(tensor)


@handles(torch.Tensor.stride, torch.Tensor.nbytes.__get__)  # type: ignore[attr-defined]
def _memory(t: Tracer, function: Any, tensor: torch.Tensor, *args: Any) -> Any:
    t.keep(t.dims(tensor), "the model's code asks how the tensor lies in memory")
    return function(tensor, *args)


@handles(
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.untyped_storage,
    torch.Tensor.data_ptr,
)
def _taken_out(t: Tracer, function: Any, tensor: torch.Tensor, *args: Any, **named: Any) -> Any:
    """What takes a tensor's values out of torch: nothing tells what becomes of them."""
    t.freeze_all(tensor, f"{t.where} takes it out of torch, where it cannot be traced")
    with t.silenced():
        return function(tensor, *args, **named)


@handles(torch.Tensor.__deepcopy__)
def _copied(t: Tracer, function: Any, tensor: torch.Tensor, memo: Any) -> torch.Tensor:
    with t.silenced():
        out = function(tensor, memo)
    t.set(out, t.dims(tensor))
    return out


@handles(torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(t: Tracer, function: Any, tensor: torch.Tensor, value: torch.Tensor) -> None:
    terms = t.dims(value)
    if tensor.shape != value.shape:
        for term in t.dims(tensor):
            u.freeze(term, f"{t.where} gives the tensor another shape")
        t.forget(tensor)
    function(tensor, value)
    t.give(tensor, terms)


@handles(torch.Tensor.expand, torch.Tensor.broadcast_to, torch.broadcast_to)
def _expand(t: Tracer, function: Any, tensor: torch.Tensor, *sizes: Any, **named: Any) -> torch.Tensor:
    out = function(tensor, *sizes, **named)
    given = _flat(sizes) if sizes else list(named.get("size", ()))
    before = [1] * (len(given) - tensor.ndim) + [int(n) for n in tensor.shape]
    for size, term, old in zip(given, t.dims(out), before, strict=True):
        if old == 1 and size != 1:
            t.adopt(size, term)
        else:
            t.meet(size, term)
    return out


@handles(torch.Tensor.expand_as)
def _expand_as(t: Tracer, function: Any, tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return _expand(t, lambda x, *_: function(x, other), tensor, *_shape(t, lambda x: x.shape, other))


@handles(torch.Tensor.view_as, torch.Tensor.reshape_as)
def _view_as(t: Tracer, function: Any, tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    with t.sizes_known():
        out = function(tensor, other)
    for term, same in zip(t.dims(out), t.dims(other), strict=True):
        t.link(term, same)
    return out


@handles(torch.Tensor.repeat, torch.tile, torch.Tensor.tile)
def _repeat(t: Tracer, function: Any, tensor: torch.Tensor, *sizes: Any) -> torch.Tensor:
    repeats = [1] * (tensor.ndim - len(_flat(sizes))) + _flat(sizes)
    out = function(tensor, *sizes)
    padded = [1] * (len(repeats) - tensor.ndim) + t.dims(tensor)
    for count, whole, term in zip(repeats, t.dims(out), padded, strict=True):
        if count > 1:
            with t.sizes_known():
                copies = t.regroup([whole], [int(count), u.size_of(term)])[0]
            t.adopt(count, copies) if u.size_of(term) == 1 else t.meet(count, copies)
    return out


@handles(torch.Tensor.split, torch.split, torch.Tensor.split_with_sizes, torch.split_with_sizes)
def _split(t: Tracer, function: Any, tensor: torch.Tensor, sizes: Any, dim: int = 0) -> Any:
    with t.sizes_known():
        out = function(tensor, sizes, dim)
    whole = int(tensor.shape[dim])
    if isinstance(sizes, int):
        sizes = [sizes] * (len(out) if whole % sizes == 0 else len(out) - 1)
    for size, part in zip(sizes, out, strict=False):
        t.meet(size, t.dims(part)[dim])
    return out


@handles(torch.Tensor.chunk, torch.chunk, torch.Tensor.tensor_split, torch.tensor_split)
def _chunk(t: Tracer, function: Any, tensor: torch.Tensor, chunks: Any, dim: int = 0) -> Any:
    with t.sizes_known():
        out = function(tensor, chunks, dim)
    first, *others = (t.dims(part)[dim] for part in out)
    for other in others:
        if u.size_of(other) == u.size_of(first):
            t.link(first, other)
        else:
            for term in (first, *others):
                u.freeze(term, f"{t.where} cuts it into unequal chunks")
    return out


@handles(torch.Tensor.narrow, torch.narrow)
def _narrow(t: Tracer, function: Any, tensor: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    _bounds(t, t.dims(tensor)[dim], int(tensor.shape[dim]), start, start + length)
    with t.sizes_known():
        return function(tensor, dim, start, length)


@handles(torch.Tensor.__getitem__)
def _getitem(t: Tracer, function: Any, tensor: torch.Tensor, index: Any) -> torch.Tensor:
    _slices(t, tensor, index)
    with t.sizes_known():
        return function(tensor, index)


@handles(torch.Tensor.__setitem__)
def _setitem(t: Tracer, function: Any, tensor: torch.Tensor, index: Any, value: Any) -> None:
    _slices(t, tensor, index)
    with t.sizes_known():
        function(tensor, index, value)


def _slices(t: Tracer, tensor: torch.Tensor, index: Any) -> None:
    """Cut the dimensions that `tensor[index]` slices, and tie the bounds to the cuts."""
    items = index if isinstance(index, tuple) else (index,)
    used = sum(i.ndim if isinstance(i, torch.Tensor) and i.dtype == torch.bool else 1 for i in items if i is not None and i is not Ellipsis)
    terms = t.dims(tensor)
    d = 0
    for item in items:
        if item is Ellipsis:
            d += tensor.ndim - used
        elif isinstance(item, slice):
            if item.step in (None, 1):
                _bounds(t, terms[d], int(tensor.shape[d]), item.start, item.stop)
            d += 1
        elif item is not None:
            d += item.ndim if isinstance(item, torch.Tensor) and item.dtype == torch.bool else 1


def _bounds(t: Tracer, term: Term, size: int, start: Any, stop: Any) -> None:
    low, high, _ = slice(start, stop).indices(size)
    if isinstance(u.resolve(term), int) or low >= high:
        return
    if (low, high) == (0, size):
        if isinstance(stop, (Size, Computed)) and stop == size:
            t.meet(stop, term)
        return
    with t.sizes_known():
        before, inside, after = t.slices(term, [low, high - low, size - high])
    if start is not None:
        t.meet(start, before) if start >= 0 else t.meet(-start, concat(inside, after))
        t.account(start)
    if stop is not None and high < size:
        t.meet(stop, concat(before, inside)) if stop >= 0 else t.meet(-stop, after)
        t.account(stop)


@handles(torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn, torch.full)
def _factory(t: Tracer, function: Any, *args: Any, **named: Any) -> torch.Tensor:
    out = function(*args, **named)
    sizes = named.get("size") or (args[0] if function is torch.full else _flat(args))
    return _adopted(t, out, list(sizes))


@handles(torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_empty, torch.Tensor.new_full)
def _new(t: Tracer, function: Any, tensor: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
    out = function(tensor, *args, **named)
    sizes = named.get("size") or (args[0] if function is torch.Tensor.new_full else _flat(args))
    return _adopted(t, out, list(sizes))


def _adopted(t: Tracer, out: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    for size, term in zip(sizes, t.dims(out), strict=True):
        t.adopt(size, term)
    return out


@handles(F.pad, torch._C._nn.pad)
def _pad(t: Tracer, function: Any, tensor: torch.Tensor, pad: Sequence[int], *args: Any, **named: Any) -> torch.Tensor:
    out = function(tensor, pad, *args, **named)
    for i in range(len(pad) // 2):
        low, high = pad[2 * i], pad[2 * i + 1]
        before, after = t.dims(tensor)[-1 - i], t.dims(out)[-1 - i]
        if not isinstance(u.resolve(before), int) and low >= 0 and high >= 0 and low + high > 0:
            with t.sizes_known():
                first, _, last = t.slices(after, [int(low), u.size_of(before), int(high)])
            t.meet(low, first)
            t.meet(high, last)
    return out


@handles(torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def _convolution(t: Tracer, function: Any, *args: Any, **named: Any) -> torch.Tensor:
    return _grouped(t, function, named.get("groups", args[6] if len(args) > 6 else 1), args, named)


@handles(torch.convolution)
def _any_convolution(t: Tracer, function: Any, *args: Any, **named: Any) -> torch.Tensor:
    return _grouped(t, function, named.get("groups", args[8] if len(args) > 8 else 1), args, named)


@handles(F.group_norm, torch.group_norm, torch.channel_shuffle, torch.native_channel_shuffle)
def _group_norm(t: Tracer, function: Any, input: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
    return _grouped(t, function, args[0] if args else named.get("num_groups", named.get("groups")), (input, *args), named)


def _grouped(t: Tracer, function: Any, groups: Any, args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    with t.sizes_known():
        out = function(*args, **named)
    if groups is not None and groups > 1:
        t.meet(groups, t.groups)
    return out


@handles(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def _layer_norm(t: Tracer, function: Any, input: torch.Tensor, normalized_shape: Sequence[int], *args: Any, **named: Any) -> torch.Tensor:
    out = function(input, normalized_shape, *args, **named)
    for size, term in zip(normalized_shape, t.dims(input)[-len(normalized_shape) :], strict=True):
        t.meet(size, term)
    return out


@handles(F.scaled_dot_product_attention)
def _attention(
    t: Tracer,
    function: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    named = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if enable_gqa:
        return function(query, key, value, **named)
    with t.silenced():
        out = function(query, key, value, **named)
    t.operation = "attention"
    t.set(out, attention(t, query, key, value, attn_mask))
    t.scales.attends(query, t.dims(query)[-1], scale, t.modules[-1] if t.modules else None)
    t.account(scale)
    return out

"""Operations that rearrange, cut and join dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...structure import unify as u
from ...structure.terms import Term, concat, product
from ..tracer import Tracer
from .base import dims_of, keep_still, number, rule


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def _view(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    return t.regroup(t.dims(self), [int(n) for n in out.shape])


@rule("permute")
def _permute(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dims: Sequence[int], **_: Any) -> list[Term]:
    terms = t.dims(self)
    return [terms[d] for d in dims]


@rule("transpose", "transpose_", "swapaxes")
def _transpose(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim0: int, dim1: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    terms[dim0], terms[dim1] = terms[dim1], terms[dim0]
    return terms


@rule("t", "t_")
def _t(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    return t.dims(self)[::-1]


@rule("unsqueeze", "unsqueeze_")
def _unsqueeze(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    terms.insert(dim % out.ndim, 1)
    return terms


@rule("squeeze", "squeeze_")
def _squeeze(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int | Sequence[int] | None = None, **_: Any) -> list[Term]:
    terms = t.dims(self)
    gone = dims_of(dim, len(terms))
    return [term for i, term in enumerate(terms) if not (i in gone and u.size_of(term) == 1)]


@rule("expand", costly=True)
def _expand(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    terms = t.dims(self)
    terms = [1] * (out.ndim - len(terms)) + terms
    return [term if u.size_of(term) == n else t.uniform(int(n)) for term, n in zip(terms, out.shape, strict=True)]


@rule("repeat")
def _repeat(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, repeats: Sequence[int], **_: Any) -> list[Term]:
    terms = t.dims(self)
    terms = [1] * (len(repeats) - len(terms)) + terms
    return [product(t.uniform(int(r)), term) if r > 1 else term for r, term in zip(repeats, terms, strict=True)]


@rule("slice", "narrow")
def _slice(
    t: Tracer,
    out: torch.Tensor,
    *,
    self: torch.Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
    **_: Any,
) -> list[Term]:
    terms = t.dims(self)
    size = int(self.shape[dim])
    low, high, stride = slice(start, end, step).indices(size)
    if stride != 1:
        u.freeze(terms[dim], f"{t.where} takes every {stride}th element")
        terms[dim] = int(out.shape[dim])
    elif (low, high) != (0, size):
        terms[dim] = t.slices(terms[dim], [low, high - low, size - high])[1] if high > low else 0
    return terms


@rule("select")
def _select(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    u.fix(terms.pop(dim), f"{t.where} takes one element by position")
    return terms


@rule("unbind")
def _unbind(t: Tracer, out: Sequence[torch.Tensor], *, self: torch.Tensor, dim: int = 0, **_: Any) -> list[list[Term]]:
    return [_select(t, tensor, self=self, dim=dim) for tensor in out]


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "unsafe_split",
    "unsafe_chunk",
    "tensor_split",
    "split_copy",
    "split_with_sizes_copy",
    "unsafe_split_with_sizes",
)
def _split(t: Tracer, out: Sequence[torch.Tensor], *, self: torch.Tensor, dim: int = 0, **_: Any) -> list[list[Term]]:
    terms = t.dims(self)
    dim %= len(terms)
    parts = t.slices(terms[dim], [int(tensor.shape[dim]) for tensor in out])
    return [[*terms[:dim], part, *terms[dim + 1 :]] for part in parts]


@rule("cat", "concat")
def _cat(t: Tracer, out: torch.Tensor, *, tensors: Sequence[torch.Tensor], dim: int = 0, **_: Any) -> list[Term]:
    rows = [t.dims(tensor) for tensor in tensors if tensor.ndim == out.ndim]
    first, *others = rows
    dim %= out.ndim
    for row in others:
        for d in range(out.ndim):
            if d != dim:
                t.unify(first[d], row[d])
    return [*first[:dim], concat(*(row[dim] for row in rows)), *first[dim + 1 :]]


@rule("stack")
def _stack(t: Tracer, out: torch.Tensor, *, tensors: Sequence[torch.Tensor], dim: int = 0, **_: Any) -> list[Term]:
    first, *others = (t.dims(tensor) for tensor in tensors)
    for row in others:
        for a, b in zip(first, row, strict=True):
            t.unify(a, b)
    first.insert(dim % out.ndim, len(tensors))
    return first


@rule("constant_pad_nd", "pad")
def _pad(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, pad: Sequence[int], **_: Any) -> list[Term]:
    terms = t.dims(self)
    for i in range(len(pad) // 2):
        d = len(terms) - 1 - i
        low, high = int(pad[2 * i]), int(pad[2 * i + 1])
        if isinstance(u.resolve(terms[d]), int):
            terms[d] = int(out.shape[d])
        elif low < 0 or high < 0:
            u.freeze(terms[d], f"{t.where} crops it")
            terms[d] = int(out.shape[d])
        else:
            pieces = (t.uniform(n) if n else 0 for n in (low, high))
            terms[d] = concat(next(pieces), terms[d], next(pieces))
    return terms


@rule("roll", "flip")
def _roll(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dims: Sequence[int] = (), **_: Any) -> list[Term]:
    terms = t.dims(self)
    keep_still(t, [terms[d] for d in dims] or terms, "moves its elements")
    return terms


@rule("as_strided", "as_strided_")
def _as_strided(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, size: Sequence[int], stride: Sequence[int], **_: Any) -> list[Term]:
    terms = t.dims(self)
    if tuple(size) == tuple(u.size_of(term) for term in terms):
        return terms
    keep_still(t, terms, "reads memory by strides")
    return [int(n) for n in out.shape]


@rule("unfold")
def _unfold(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dimension: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    keep_still(t, [terms[dimension]], "slides a window along it")
    terms[dimension] = int(out.shape[dimension])
    return [*terms, int(out.shape[-1])]


@rule("im2col")
def _im2col(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, kernel_size: Sequence[int], **_: Any) -> list[Term]:
    *batch, channels, _height, _width = t.dims(self)
    keep_still(t, [_height, _width], "slides a window along it")
    return [*batch, product(channels, math.prod(kernel_size)), int(out.shape[-1])]


@rule("col2im")
def _col2im(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    *batch, columns, places = t.dims(self)
    keep_still(t, [places], "sums windows along it")
    with t.sizes_known():
        channels, kernel = t.regroup([columns], [int(out.shape[-3]), u.size_of(columns) // int(out.shape[-3])])
    number(kernel)
    return [*batch, channels, int(out.shape[-2]), int(out.shape[-1])]


@rule("pixel_shuffle")
def _pixel_shuffle(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, upscale_factor: int, **_: Any) -> list[Term]:
    *batch, channels, height, width = t.dims(self)
    keep_still(t, [height, width], "interleaves it")
    with t.sizes_known():
        kept, square = t.regroup([channels], [int(out.shape[-3]), upscale_factor**2])
    number(square)
    return [*batch, kept, int(out.shape[-2]), int(out.shape[-1])]


@rule("pixel_unshuffle")
def _pixel_unshuffle(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, downscale_factor: int, **_: Any) -> list[Term]:
    *batch, channels, height, width = t.dims(self)
    keep_still(t, [height, width], "interleaves it")
    return [*batch, product(channels, downscale_factor**2), int(out.shape[-2]), int(out.shape[-1])]

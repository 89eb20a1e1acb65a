"""Operations that rearrange, cut and join dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...structure import unify as u
from ...structure.terms import Term, concat, product
from ...structure.unify import Variable
from ..tracer import Tracer
from .base import dims_of, keep_still, number, rule


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def _view(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    return t.regroup(t.dims(self), [int(n) for n in out.shape])


@rule("permute")
def _permute(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dims: Sequence[int], **_: Any) -> list[Term]:
    terms = t.dims(self)
    return [terms[d] for d in dims]


@rule("transpose", "swapaxes")
def _transpose(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim0: int, dim1: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    terms[dim0], terms[dim1] = terms[dim1], terms[dim0]
    return terms


@rule("t")
def _t(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    return t.dims(self)[::-1]


@rule("unsqueeze")
def _unsqueeze(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    terms.insert(dim % out.ndim, 1)
    return terms


@rule("squeeze")
def _squeeze(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int | Sequence[int] | None = None, **_: Any) -> list[Term]:
    terms = t.dims(self)
    gone = dims_of(dim, len(terms))
    return [term for i, term in enumerate(terms) if not (i in gone and u.size_of(term) == 1)]


@rule("expand", costly=True)
def _expand(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    terms = t.dims(self)
    terms = [1] * (out.ndim - len(terms)) + terms
    return [term if u.size_of(term) == n else t.uniform(int(n)) for term, n in zip(terms, out.shape, strict=True)]


@rule("repeat", costly=True)
def _repeat(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, repeats: Sequence[int], **_: Any) -> list[Term]:
    terms = t.dims(self)
    terms = [1] * (len(repeats) - len(terms)) + terms
    return [product(t.uniform(int(r)), term) if r > 1 else term for r, term in zip(repeats, terms, strict=True)]


@rule("slice")
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


@rule("slice_scatter")
def _slice_scatter(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, src: torch.Tensor, **named: Any) -> list[Term]:
    for a, b in zip(_slice(t, src, self=self, **named), t.dims(src), strict=True):
        t.unify(a, b)
    return t.dims(self)


@rule("select_scatter")
def _select_scatter(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, src: torch.Tensor, dim: int, **_: Any) -> list[Term]:
    for a, b in zip(_select(t, src, self=self, dim=dim), t.dims(src), strict=True):
        t.unify(a, b)
    return t.dims(self)


@rule("diagonal")
def _diagonal(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim1: int = 0, dim2: int = 1, **_: Any) -> list[Term]:
    terms = t.dims(self)
    read = {dim1 % len(terms), dim2 % len(terms)}
    keep_still(t, [terms[d] for d in read], "reads a diagonal of it")
    return [*(term for d, term in enumerate(terms) if d not in read), int(out.shape[-1])]


@rule("diagonal_scatter")
def _diagonal_scatter(
    t: Tracer, out: torch.Tensor, *, self: torch.Tensor, src: torch.Tensor, dim1: int = 0, dim2: int = 1, **_: Any
) -> list[Term]:
    for a, b in zip(_diagonal(t, src, self=self, dim1=dim1, dim2=dim2), t.dims(src), strict=True):
        t.unify(a, b)
    return t.dims(self)


@rule("diag_embed")
def _diag_embed(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim1: int = -2, dim2: int = -1, **_: Any) -> list[Term]:
    *terms, diagonal = t.dims(self)
    keep_still(t, [diagonal], "puts it on a diagonal")
    for d in sorted((dim1 % out.ndim, dim2 % out.ndim)):
        terms.insert(d, int(out.shape[d]))
    return terms


@rule("tril", "triu")
def _triangle(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    terms = t.dims(self)
    keep_still(t, terms[-2:], "reads a triangle of it")
    return terms


@rule("rot90")
def _rot90(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> list[Term]:
    terms = t.dims(self)
    a, b = dims
    keep_still(t, [terms[a], terms[b]], "moves its elements")
    if k % 2:
        terms[a], terms[b] = terms[b], terms[a]
    return terms


@rule("roll", "flip")
def _roll(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dims: Sequence[int] = (), **_: Any) -> list[Term]:
    terms = t.dims(self)
    keep_still(t, [terms[d] for d in dims] or terms, "moves its elements")
    return terms


@rule("as_strided")
def _as_strided(
    t: Tracer,
    out: torch.Tensor,
    *,
    self: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
    **_: Any,
) -> list[Term]:
    terms = t.dims(self)
    steps = zip(self.shape, self.stride(), stride, strict=False)
    if tuple(size) == tuple(self.shape) and storage_offset in (None, self.storage_offset()) and all(n < 2 or a == b for n, a, b in steps):
        return terms
    keep_still(t, terms, "reads memory by strides")
    return [int(n) for n in out.shape]


@rule("set")
def _set(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, source: Any = None, **named: Any) -> list[Term]:
    if not isinstance(source, torch.Tensor) or "storage_offset" in named:
        raise NotImplementedError
    return t.dims(source)


@rule("unfold")
def _unfold(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dimension: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    dimension %= max(len(terms), 1)
    if terms:
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


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, groups: int) -> list[Term]:
    batch, channels, *space = t.dims(self)
    each = Variable(int(self.shape[1]) // groups, piece=True)
    t.unify(channels, product(t.group(groups), each))
    return [batch, product(each, t.groups), *space]


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


@rule("_pack_padded_sequence")
def _pack(t: Tracer, out: Sequence[torch.Tensor], *, input: torch.Tensor, **_: Any) -> list[list[Term]]:
    first, second, *features = t.dims(input)
    keep_still(t, [first, second], "packs sequences along it")
    return [[int(out[0].shape[0]), *features], [int(n) for n in out[1].shape]]

"""What each ATen operation does to the terms of its operands' dimensions.

A rule is one function, registered under the names of the operations it serves. It gets the tracer, the operation's output and the
operation's arguments under their names in its schema, unifies what must be equal, and returns the terms of the output (a list of lists
where there are several outputs). An operation without a rule freezes every axis it touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..structure import unify as u
from ..structure.terms import Term, concat, product
from ..structure.unify import Variable
from .tracer import Tracer

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for `aten` operations of these names, overloads included."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def elementwise(t: Tracer, operands: Sequence[torch.Tensor], out: torch.Tensor) -> list[Term]:
    """Pointwise operation with broadcasting: dimensions aligned from the right hold the same elements."""
    terms: list[Term] = [1] * out.ndim
    for operand in operands:
        for i, term in enumerate(reversed(t.dims(operand)), start=1):
            if u.size_of(term) != 1 and i <= out.ndim:
                if u.size_of(terms[-i]) == 1:
                    terms[-i] = term
                else:
                    t.unify(terms[-i], term)
    return terms


@rule("hardswish", "prelu", "_prelu_kernel", "masked_fill", "where", "floor_divide")
def _elementwise(t: Tracer, out: torch.Tensor, **named: Any) -> list[Term]:
    # Elementwise operations that do not carry torch's tag for it.
    return elementwise(t, [value for value in named.values() if isinstance(value, torch.Tensor)], out)


@rule("glu")
def _glu(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int = -1) -> list[Term]:
    terms = t.dims(self)
    with t.sizes_known():
        value, gate = t.slices(terms[dim], [int(out.shape[dim])] * 2)
    t.unify(value, gate)
    terms[dim] = value
    return terms


def number(term: Term) -> Term:
    """A dimension that no method may change, such as a kernel's height: its size as a plain number."""
    for variable in u.variables(term):
        variable.bound = variable.size
    return u.resolve(term)


def _plain(t: Tracer, terms: Sequence[Term], reason: str) -> None:
    for term in terms:
        u.freeze(term, f"{t.where} {reason}")


# Copies and pointwise operations


@rule("clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "lift_fresh_copy", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli", "fill_", "zero_", "normal_",
      "uniform_", "bernoulli_", "_conj", "_neg_view", "fill")  # fmt: skip
def _same(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    return t.dims(self)


@rule("copy_", "copy")
def _copy(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, src: torch.Tensor, **_: Any) -> list[Term]:
    return elementwise(t, (self, src), out)


@rule("native_dropout")
def _dropout(t: Tracer, out: Any, *, input: torch.Tensor, **_: Any) -> list[list[Term]]:
    return [t.dims(input), t.dims(input)]


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn", "empty_strided", "new_empty_strided")
def _uniform(t: Tracer, out: torch.Tensor, **_: Any) -> list[Term]:
    # All elements are alike, so the dimensions may become whatever they meet.
    return [Variable(int(n), piece=True) for n in out.shape]


# Rearranging dimensions


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
    gone = _dims(dim, len(terms))
    return [term for i, term in enumerate(terms) if not (i in gone and u.size_of(term) == 1)]


@rule("expand")
def _expand(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    terms = t.dims(self)
    terms = [1] * (out.ndim - len(terms)) + terms
    # Copies along a new dimension are all alike, so it may become whatever it meets.
    return [term if u.size_of(term) == n else Variable(int(n), piece=True) for term, n in zip(terms, out.shape, strict=True)]


@rule("repeat")
def _repeat(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, repeats: Sequence[int], **_: Any) -> list[Term]:
    terms = t.dims(self)
    terms = [1] * (len(repeats) - len(terms)) + terms
    return [product(Variable(int(r), piece=True), term) if r > 1 else term for r, term in zip(repeats, terms, strict=True)]


@rule("slice", "narrow")
def _slice(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1,
           **_: Any) -> list[Term]:  # fmt: skip
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


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split", "split_copy", "split_with_sizes_copy", "unsafe_split_with_sizes")
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
            # What is padded is all alike, so it may become whatever it meets.
            pieces = (Variable(n, piece=True) if n else 0 for n in (low, high))
            terms[d] = concat(next(pieces), terms[d], next(pieces))
    return terms


@rule("roll", "flip")
def _roll(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dims: Sequence[int] = (), **_: Any) -> list[Term]:
    terms = t.dims(self)
    _plain(t, [terms[d] for d in dims] or terms, "moves its elements")
    return terms


@rule("as_strided", "as_strided_")
def _as_strided(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, size: Sequence[int], stride: Sequence[int], **_: Any) -> list[Term]:
    terms = t.dims(self)
    if tuple(size) == tuple(u.size_of(term) for term in terms):
        return terms
    _plain(t, terms, "reads memory by strides")
    return [int(n) for n in out.shape]


@rule("unfold")
def _unfold(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dimension: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    _plain(t, [terms[dimension]], "slides a window along it")
    terms[dimension] = int(out.shape[dimension])
    return [*terms, int(out.shape[-1])]


@rule("im2col")
def _im2col(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, kernel_size: Sequence[int], **_: Any) -> list[Term]:
    *batch, channels, _height, _width = t.dims(self)
    _plain(t, [_height, _width], "slides a window along it")
    return [*batch, product(channels, math.prod(kernel_size)), int(out.shape[-1])]


@rule("col2im")
def _col2im(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    *batch, columns, places = t.dims(self)
    _plain(t, [places], "sums windows along it")
    with t.sizes_known():
        channels, kernel = t.regroup([columns], [int(out.shape[-3]), u.size_of(columns) // int(out.shape[-3])])
    number(kernel)
    return [*batch, channels, int(out.shape[-2]), int(out.shape[-1])]


@rule("pixel_shuffle")
def _pixel_shuffle(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, upscale_factor: int, **_: Any) -> list[Term]:
    *batch, channels, height, width = t.dims(self)
    _plain(t, [height, width], "interleaves it")
    with t.sizes_known():
        kept, square = t.regroup([channels], [int(out.shape[-3]), upscale_factor**2])
    number(square)
    return [*batch, kept, int(out.shape[-2]), int(out.shape[-1])]


@rule("pixel_unshuffle")
def _pixel_unshuffle(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, downscale_factor: int, **_: Any) -> list[Term]:
    *batch, channels, height, width = t.dims(self)
    _plain(t, [height, width], "interleaves it")
    return [*batch, product(channels, downscale_factor**2), int(out.shape[-2]), int(out.shape[-1])]


# Reductions


@rule("sum", "mean", "amax", "amin", "var", "std", "prod", "norm", "linalg_vector_norm", "logsumexp", "any", "all", "nansum", "var_mean", "std_mean",
      "max", "min")  # fmt: skip
def _reduce(t: Tracer, out: Any, *, self: torch.Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, **named: Any) -> Any:
    if isinstance(named.get("other"), torch.Tensor):
        return elementwise(t, (self, named["other"]), out)
    terms = t.dims(self)
    gone = _dims(dim, len(terms))
    t.mixed.extend(terms[d] for d in gone)
    kept = [1 if i in gone else term for i, term in enumerate(terms) if keepdim or i not in gone]
    if isinstance(out, torch.Tensor):
        return kept
    if torch.is_tensor(out[1]) and not out[1].is_floating_point():
        _plain(t, [terms[d] for d in gone], "looks for a position along it")
    return [kept for _ in out]


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    t.mixed.append(terms[dim])
    return terms


@rule("cumsum", "cumprod", "sort", "argsort", "logcumsumexp")
def _scan(t: Tracer, out: Any, *, self: torch.Tensor, dim: int = -1, **_: Any) -> Any:
    terms = t.dims(self)
    _plain(t, [terms[dim]], "depends on the order along it")
    return terms if isinstance(out, torch.Tensor) else [terms for _ in out]


@rule("argmax", "argmin", "topk")
def _arg(t: Tracer, out: Any, *, self: torch.Tensor, dim: int | None = -1, **_: Any) -> Any:
    terms = t.dims(self)
    _plain(t, terms if dim is None else [terms[dim]], "looks for a position along it")
    return [int(n) for n in out.shape] if isinstance(out, torch.Tensor) else [[int(n) for n in o.shape] for o in out]


# Matrix products


@rule("mm")
def _mm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, mat2: torch.Tensor, **_: Any) -> list[Term]:
    return _matmul(t, self, mat2)


@rule("bmm")
def _bmm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, mat2: torch.Tensor, **_: Any) -> list[Term]:
    return _matmul(t, self, mat2)


@rule("addmm", "_addmm_activation")
def _addmm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **_: Any) -> list[Term]:
    t.set(out, _matmul(t, mat1, mat2))
    return elementwise(t, (out, self), out)


@rule("baddbmm")
def _baddbmm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, **_: Any) -> list[Term]:
    t.set(out, _matmul(t, batch1, batch2))
    return elementwise(t, (out, self), out)


@rule("mv", "dot")
def _mv(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **named: Any) -> list[Term]:
    *rows, inner = t.dims(self)
    t.unify(inner, t.dims(named.get("vec", named.get("tensor")))[0])  # type: ignore[arg-type]
    t.costs.append(product(*rows, inner))
    return rows


def _matmul(t: Tracer, a: torch.Tensor, b: torch.Tensor) -> list[Term]:
    *batch, rows, inner = t.dims(a)
    *other, inner_b, columns = t.dims(b)
    for x, y in zip(batch, other, strict=True):
        t.unify(x, y)
    t.unify(inner, inner_b)
    if batch:  # a product of two activations
        t.mixed.append(inner)
    t.costs.append(product(*batch, rows, inner, columns))
    return [*batch, rows, columns]


def attention(t: Tracer, out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> list[Term]:
    """softmax(q kᵀ + mask) v over (…, tokens, head width), batch dimensions broadcast."""
    *batch_q, rows, width = t.dims(query)
    *batch_k, columns, width_k = t.dims(key)
    *batch_v, columns_v, out_width = t.dims(value)
    t.unify(width, width_k)
    t.unify(columns, columns_v)
    t.mixed += [width, columns]
    scores = torch.empty(out.shape[:-1] + key.shape[-2:-1], device="meta")
    parts = []
    for batch in (batch_q, batch_k, batch_v):
        part = torch.empty([u.size_of(term) for term in batch] + [1, 1], device="meta")
        t.set(part, [*batch, 1, 1])
        parts.append(part)
    t.set(scores, [*(elementwise(t, parts, scores)[:-2]), rows, columns])
    if mask is not None:
        elementwise(t, (scores, mask), scores)
    batch = t.dims(scores)[:-2]
    t.costs.append(product(*batch, rows, columns, width))
    t.costs.append(product(*batch, rows, columns, out_width))
    return [*batch, rows, out_width]


# Convolutions


@rule("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "mkldnn_convolution")
def _convolution(t: Tracer, out: torch.Tensor, *, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
                 transposed: bool = False, groups: int = 1, **_: Any) -> list[Term]:  # fmt: skip
    batch, channels, *space = t.dims(input)
    first, second, *kernel = t.dims(weight)
    for side in kernel:
        number(side)
    space_out = [_along(t, term, int(before), int(after)) for term, before, after in zip(space, input.shape[2:], out.shape[2:], strict=True)]
    t.groups = group = Variable(groups, hint="g", piece=True) if groups > 1 else 1
    if transposed:
        t.unify(channels, product(group, Variable(int(weight.shape[0]) // groups, piece=True)) if groups > 1 else channels)
        t.unify(first, channels)
        made = product(group, second)
        t.costs.append(product(batch, channels, *space, second, *kernel))
    else:
        t.unify(channels, product(group, second))
        if groups > 1:
            t.unify(first, product(group, Variable(int(weight.shape[0]) // groups, piece=True)))
        made = first
        t.costs.append(product(batch, made, *space_out, second, *kernel))
    if bias is not None:
        t.unify(made, t.dims(bias)[0])
    return [batch, made, *space_out]


def _along(t: Tracer, term: Term, before: int, after: int) -> Term:
    """A dimension that a kernel slides along."""
    if isinstance(u.resolve(term), int):
        return after
    if before == after:
        t.mixed.append(term)
        u.order(term)
        return term
    u.freeze(term, f"{t.where} slides a kernel along it")
    return after


# Normalisation


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm")  # fmt: skip
def _batch_norm(t: Tracer, out: Any, *, input: torch.Tensor, **named: Any) -> Any:
    channels = t.dims(input)[1]
    for key in ("weight", "bias", "running_mean", "running_var"):
        if named.get(key) is not None:
            t.unify(channels, t.dims(named[key])[0])
    if named.get("training") or "no_stats" in t.operation:
        batch, _, *space = t.dims(input)
        t.mixed += [batch, *space]
    return _with_statistics(t.dims(input), out)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(t: Tracer, out: Any, *, input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None,
                bias: torch.Tensor | None = None, **_: Any) -> Any:  # fmt: skip
    terms = t.dims(input)
    t.mixed.extend(terms[-len(normalized_shape) :])
    for affine in (weight, bias):
        if affine is not None:
            for a, b in zip(terms[-len(normalized_shape) :], t.dims(affine), strict=True):
                t.unify(a, b)
    return _with_statistics(terms, out)


@rule("native_group_norm")
def _group_norm(t: Tracer, out: Any, *, input: torch.Tensor, group: int, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None,
                **_: Any) -> Any:  # fmt: skip
    terms = t.dims(input)
    t.mixed.append(terms[1])
    t.groups = 1
    if group > 1:
        t.groups = Variable(group, hint="g", piece=True)
        t.unify(terms[1], product(t.groups, Variable(int(input.shape[1]) // group, piece=True)))
    for affine in (weight, bias):
        if affine is not None:
            t.unify(terms[1], t.dims(affine)[0])
    return _with_statistics(terms, out)


def _with_statistics(terms: list[Term], out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return terms
    return [terms, *([int(n) for n in extra.shape] for extra in out[1:])]


# Pooling and resampling


@rule("max_pool2d_with_indices", "max_pool2d", "max_pool1d", "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d",
      "adaptive_max_pool2d", "adaptive_max_pool1d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_nearest1d", "upsample_linear1d", "reflection_pad2d", "replication_pad2d",
      "reflection_pad1d", "replication_pad1d", "avg_pool3d", "max_pool3d_with_indices", "lp_pool2d")  # fmt: skip
def _pool(t: Tracer, out: Any, *, self: torch.Tensor | None = None, input: torch.Tensor | None = None, **_: Any) -> Any:
    source = self if self is not None else input
    assert source is not None
    space = int(next(c for c in t.operation if c.isdigit()))
    terms = t.dims(source)
    _plain(t, terms[-space:], "pools or resamples it")

    def of(tensor: torch.Tensor) -> list[Term]:
        return [*terms[:-space], *(int(n) for n in tensor.shape[-space:])]

    return of(out) if isinstance(out, torch.Tensor) else [of(tensor) for tensor in out]


@rule("grid_sampler_2d", "grid_sampler")
def _grid_sample(t: Tracer, out: torch.Tensor, *, input: torch.Tensor, grid: torch.Tensor, **_: Any) -> list[Term]:
    batch, channels, *space = t.dims(input)
    _plain(t, [*space, *t.dims(grid)[1:]], "samples by position")
    t.unify(batch, t.dims(grid)[0])
    return [batch, channels, *(int(n) for n in out.shape[2:])]


# Looking up by position


@rule("index", "_unsafe_index")
def _index(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, indices: Sequence[torch.Tensor | None], **_: Any) -> list[Term]:
    terms = t.dims(self)
    used = [(d, index) for d, index in enumerate(indices) if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for _, index in used):
        _plain(t, terms, "selects by a mask")
        return [int(n) for n in out.shape]
    for d, _index in used:
        u.freeze(terms[d], f"{t.where} looks it up by position")
    places = torch.empty(torch.broadcast_shapes(*(index.shape for _, index in used)), device="meta")
    found = elementwise(t, [index for _, index in used], places)
    chosen = {d for d, _ in used}
    rest = [term for d, term in enumerate(terms) if d not in chosen]
    adjacent = max(chosen) - min(chosen) + 1 == len(chosen)
    at = min(chosen) if adjacent else 0
    return [*rest[:at], *found, *rest[at:]]


@rule("index_select")
def _index_select(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, index: torch.Tensor, **_: Any) -> list[Term]:
    terms = t.dims(self)
    u.freeze(terms[dim], f"{t.where} looks it up by position")
    terms[dim] = t.dims(index)[0] if index.ndim else 1
    return terms


@rule("embedding")
def _embedding(t: Tracer, out: torch.Tensor, *, weight: torch.Tensor, indices: torch.Tensor, **_: Any) -> list[Term]:
    rows, width = t.dims(weight)
    u.freeze(rows, f"{t.where} looks it up by position")
    return [*t.dims(indices), width]


@rule("gather")
def _gather(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, index: torch.Tensor, **_: Any) -> list[Term]:
    terms, places = t.dims(self), t.dims(index)
    _plain(t, [*terms, *places], "looks it up by position")
    return [int(n) for n in out.shape]


COSTLY = {_mm, _bmm, _addmm, _baddbmm, _mv, _convolution, _uniform}
"""Rules that run even where no axis is touched: products that still cost, and new tensors without operands."""


def _dims(dim: int | Sequence[int] | None, ndim: int) -> set[int]:
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return set(range(ndim))
    return {d % ndim for d in ([dim] if isinstance(dim, int) else dim)}

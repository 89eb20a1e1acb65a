"""Matrix products, attention and convolutions: what costs multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...structure import unify as u
from ...structure.terms import Term, product
from ...structure.unify import Variable
from ..tracer import Tracer
from ..vanishing import vanishes
from .base import broadcast, elementwise, number, rule


@rule("mm", costly=True)
def _mm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, mat2: torch.Tensor, **_: Any) -> list[Term]:
    return _matmul(t, self, mat2)


@rule("bmm", costly=True)
def _bmm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, mat2: torch.Tensor, **_: Any) -> list[Term]:
    return _matmul(t, self, mat2)


@rule("addmm", "_addmm_activation", costly=True)
def _addmm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **_: Any) -> list[Term]:
    t.set(out, _matmul(t, mat1, mat2))
    return elementwise(t, (out, self))


@rule("baddbmm", costly=True)
def _baddbmm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, **_: Any) -> list[Term]:
    t.set(out, _matmul(t, batch1, batch2))
    return elementwise(t, (out, self))


@rule("addbmm", costly=True)
def _addbmm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, **_: Any) -> list[Term]:
    batch, *terms = _matmul(t, batch1, batch2)
    t.mixed.append(batch)
    return broadcast(t, (terms, t.dims(self)))


@rule("addmv", costly=True)
def _addmv(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, mat: torch.Tensor, vec: torch.Tensor, **_: Any) -> list[Term]:
    return broadcast(t, (_mv(t, out, self=mat, vec=vec), t.dims(self)))


@rule("addr")
def _addr(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, vec1: torch.Tensor, vec2: torch.Tensor, **_: Any) -> list[Term]:
    return broadcast(t, ([*t.dims(vec1), *t.dims(vec2)], t.dims(self)))


@rule("_trilinear", costly=True)
def _trilinear(
    t: Tracer, out: torch.Tensor, *, i1: torch.Tensor, i2: torch.Tensor, i3: torch.Tensor, sumdim: Sequence[int], **named: Any
) -> list[Term]:
    rows = []
    for tensor, key in ((i1, "expand1"), (i2, "expand2"), (i3, "expand3")):
        rows.append(t.dims(tensor))
        for d in sorted(named[key]):
            rows[-1].insert(d, 1)
    terms = broadcast(t, rows)
    t.costs.append(product(*terms))
    t.mixed += [terms[d] for d in sumdim]
    return [term for d, term in enumerate(terms) if d not in sumdim]


@rule("_cdist_forward", "_euclidean_dist")
def _distances(t: Tracer, out: torch.Tensor, *, x1: torch.Tensor, x2: torch.Tensor, **_: Any) -> list[Term]:
    *batch, rows, inner = t.dims(x1)
    *other, columns, inner_2 = t.dims(x2)
    t.unify(inner, inner_2)
    t.mixed.append(inner)
    return [*broadcast(t, (batch, other)), rows, columns]


@rule("_pdist_forward")
def _pairs(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    rows, inner = t.dims(self)
    u.freeze(rows, f"{t.where} lists pairs of it")
    t.mixed.append(inner)
    return [int(n) for n in out.shape]


@rule("linalg_cross")
def _cross(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, other: torch.Tensor, dim: int = -1) -> list[Term]:
    terms = elementwise(t, (self, other))
    u.freeze(terms[dim], f"{t.where} reads it as coordinates")
    return terms


@rule(
    "linalg_inv_ex",
    "linalg_cholesky_ex",
    "linalg_matrix_exp",
    "linalg_qr",
    "linalg_eig",
    "_linalg_eigvals",
    "_linalg_eigh",
    "_linalg_det",
    "_linalg_slogdet",
    "_linalg_svd",
    "linalg_lu_factor_ex",
    "linalg_lu",
    "linalg_pinv",
    "cholesky_inverse",
)
def _matrices(t: Tracer, out: Any, *, self: torch.Tensor | None = None, A: torch.Tensor | None = None, **_: Any) -> Any:
    """Operations on matrices, the last two dimensions, each on its own."""
    source = A if self is None else self
    assert source is not None
    *batch, rows, columns = t.dims(source)
    for term in (rows, columns):
        u.freeze(term, f"{t.where} reads it as a side of a matrix")

    def of(tensor: torch.Tensor) -> list[Term]:
        outer = batch if tensor.ndim >= len(batch) else []
        return [*outer, *(int(n) for n in tensor.shape[len(outer) :])]

    return of(out) if isinstance(out, torch.Tensor) else [of(tensor) for tensor in out]


@rule("_linalg_solve_ex", "linalg_solve_triangular", "linalg_lstsq", "cholesky_solve", "triangular_solve")
def _solve(t: Tracer, out: Any, **named: Any) -> Any:
    sides = [value for value in named.values() if isinstance(value, torch.Tensor)]
    if len({tensor.ndim for tensor in sides}) > 1 or any(tensor.ndim < 2 for tensor in sides):
        raise NotImplementedError
    rows = [t.dims(tensor) for tensor in sides]
    for row in rows:
        for term in row[-2:]:
            u.freeze(term, f"{t.where} reads it as a side of a matrix")
    batch = broadcast(t, [row[:-2] for row in rows])

    def of(tensor: torch.Tensor) -> list[Term]:
        known = [*batch, *(int(n) for n in tensor.shape[len(batch) :])]
        # A result that has not all dimensions of the batch, such as an empty one, says nothing of them.
        return known if tuple(map(u.size_of, known)) == tuple(tensor.shape) else [int(n) for n in tensor.shape]

    return of(out) if isinstance(out, torch.Tensor) else [of(tensor) for tensor in out]


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _fourier(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: Sequence[int], **_: Any) -> list[Term]:
    terms = t.dims(self)
    for d in dim:
        u.freeze(terms[d], f"{t.where} transforms it")
        terms[d] = terms[d] if int(out.shape[d]) == u.size_of(terms[d]) else int(out.shape[d])
    return terms


@rule("mv", "dot", "vdot", costly=True)
def _mv(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **named: Any) -> list[Term]:
    *rows, inner = t.dims(self)
    t.unify(inner, t.dims(next(named[key] for key in ("vec", "tensor", "other") if key in named))[0])
    t.costs.append(product(*rows, inner))
    return rows


def _matmul(t: Tracer, a: torch.Tensor, b: torch.Tensor) -> list[Term]:
    *batch, rows, inner = t.dims(a)
    *other, inner_b, columns = t.dims(b)
    for x, y in zip(batch, other, strict=True):
        t.unify(x, y)
    t.unify(inner, inner_b)
    if batch and not (vanishes(t, a) or vanishes(t, b)):  # a product of two activations, to which removed elements may add
        t.mixed.append(inner)
    t.costs.append(product(*batch, rows, inner, columns))
    return [*batch, rows, columns]


def attention(t: Tracer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> list[Term]:
    """softmax(q kᵀ + mask) v over (…, tokens, head width), batch dimensions broadcast."""
    *batch_q, rows, width = t.dims(query)
    *batch_k, columns, width_k = t.dims(key)
    *batch_v, columns_v, out_width = t.dims(value)
    t.unify(width, width_k)
    t.unify(columns, columns_v)
    t.mixed += [width, columns]
    for term, letter in ((width, "d"), *((heads, "h") for heads in batch_q[-1:])):
        for variable in u.variables(term):
            variable.hint = variable.hint or letter
    batch = broadcast(t, (batch_q, batch_k, batch_v))
    if mask is not None:
        broadcast(t, ([*batch, rows, columns], t.dims(mask)))
    t.fused_costs.append(product(*batch, rows, columns, width))
    t.fused_costs.append(product(*batch, rows, columns, out_width))
    return [*batch, rows, out_width]


@rule("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "mkldnn_convolution", costly=True)
def _convolution(
    t: Tracer,
    out: torch.Tensor,
    *,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
    groups: int = 1,
    **_: Any,
) -> list[Term]:
    batch, channels, *space = t.dims(input)
    first, second, *kernel = t.dims(weight)
    for side in kernel:
        t.kernel_sides.update(u.variables(side))
        number(side)
    space_out = [
        _along(t, term, int(before), int(after)) for term, before, after in zip(space, input.shape[2:], out.shape[2:], strict=True)
    ]
    group = t.group(groups)
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


@rule("torchvision::deform_conv2d", costly=True)
def _deformed(
    t: Tracer,
    out: torch.Tensor,
    *,
    input: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    **_: Any,
) -> list[Term]:
    batch, *places = t.dims(offset)
    for term in (*places, *(t.dims(mask)[1:] if mask.numel() else ()), *t.dims(input)[2:]):
        u.freeze(term, f"{t.where} samples by position")
    t.unify(batch, t.dims(input)[0])
    if mask.numel():
        t.unify(batch, t.dims(mask)[0])
    return _convolution(t, out, input=input, weight=weight, bias=bias, groups=groups)


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

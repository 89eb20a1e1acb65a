"""Matrix products, attention and convolutions: what costs multiply-accumulates."""

from __future__ import annotations

from typing import Any

import torch

from ...structure import unify as u
from ...structure.terms import Term, product
from ...structure.unify import Variable
from ..tracer import Tracer
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


@rule("mv", "dot", costly=True)
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

"""Copies, new tensors and elementwise operations."""

from __future__ import annotations

from typing import Any

import torch

from ...structure import unify as u
from ...structure.terms import Term
from ..tracer import Tracer
from .base import elementwise, rule


@rule("clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "lift_fresh_copy", "_conj", "_neg_view")
def _same(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    if t.is_alike(self):
        t.set_alike(out)
    return t.dims(self)


@rule("zeros_like", "ones_like", "full_like")
def _filled_like(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    t.set_alike(out)
    return t.dims(self)


@rule(
    "empty_like",
    "rand_like",
    "randn_like",
    "randint_like",
    "fill",
    "zero",
    "normal_",
    "uniform",
    "random",
    "exponential",
    "geometric",
    "cauchy",
    "log_normal",
)
def _like(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    return t.dims(self)


@rule("copy_", "copy")
def _copy(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, src: torch.Tensor, **_: Any) -> list[Term]:
    return elementwise(t, (self, src))


@rule("native_dropout")
def _dropout(t: Tracer, out: Any, *, input: torch.Tensor, **_: Any) -> list[list[Term]]:
    return [t.dims(input), t.dims(input)]


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "rand",
    "randn",
    "empty_strided",
    "new_empty_strided",
    costly=True,
)
def _uniform(t: Tracer, out: torch.Tensor, **_: Any) -> list[Term]:
    if "rand" not in t.operation and "empty" not in t.operation:
        t.set_alike(out)
    return [t.uniform(int(n)) for n in out.shape]


@rule(
    "hardswish",
    "prelu",
    "_prelu_kernel",
    "masked_fill",
    "where",
    "floor_divide",
    "complex",
    "polar",
    "bernoulli",
    "normal",
    "poisson",
    "binomial",
    "_standard_gamma",
    "rrelu_with_noise",
)
def _elementwise(t: Tracer, out: torch.Tensor, **named: Any) -> list[Term]:
    # Elementwise operations that do not carry torch's tag for it.
    return elementwise(t, [value for value in named.values() if isinstance(value, torch.Tensor)])


@rule("log_sigmoid_forward")
def _log_sigmoid(t: Tracer, out: Any, *, self: torch.Tensor) -> list[list[Term]]:
    value, buffer = out
    terms = t.dims(self)
    return [terms, terms if buffer.shape == value.shape else [int(n) for n in buffer.shape]]


@rule("view_as_real")
def _as_real(t: Tracer, out: torch.Tensor, *, self: torch.Tensor) -> list[Term]:
    return [*t.dims(self), 2]


@rule("view_as_complex")
def _as_complex(t: Tracer, out: torch.Tensor, *, self: torch.Tensor) -> list[Term]:
    *terms, parts = t.dims(self)
    u.fix(parts, f"{t.where} reads it as real and imaginary parts")
    return terms


@rule("glu")
def _glu(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int = -1) -> list[Term]:
    terms = t.dims(self)
    with t.sizes_known():
        value, gate = t.slices(terms[dim], [int(out.shape[dim])] * 2)
    t.unify(value, gate)
    terms[dim] = value
    return terms

"""Reductions, and operations that depend on the order along a dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...structure import unify as u
from ...structure.terms import Term
from ..tracer import Tracer
from ..vanishing import vanishes
from .base import broadcast, dims_of, elementwise, keep_still, rule


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "aminmax",
    "_aminmax",
    "var",
    "std",
    "prod",
    "norm",
    "native_norm",
    "linalg_vector_norm",
    "logsumexp",
    "any",
    "all",
    "count_nonzero",
    "nansum",
    "var_mean",
    "std_mean",
    "max",
    "min",
    "median",
    "nanmedian",
)
def _reduce(t: Tracer, out: Any, *, self: torch.Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, **named: Any) -> Any:
    if isinstance(named.get("other"), torch.Tensor):
        return elementwise(t, (self, named["other"]))
    terms = t.dims(self)
    gone = dims_of(dim, len(terms))
    if not (t.operation in ("sum", "nansum") and vanishes(t, self)):  # a sum of what is there alone: zeros add nothing
        t.mixed.extend(terms[d] for d in gone)
    t.reduced.extend(terms[d] for d in gone)
    kept = _kept(terms, gone, keepdim)
    if isinstance(out, torch.Tensor):
        return kept
    return [kept if tensor.is_floating_point() or i == 0 else _position(t, terms, gone, kept) for i, tensor in enumerate(out)]


def _kept(terms: list[Term], gone: set[int], keepdim: bool) -> list[Term]:
    return [1 if i in gone else term for i, term in enumerate(terms) if keepdim or i not in gone]


def _position(t: Tracer, terms: list[Term], searched: set[int], kept: list[Term]) -> Callable[[], list[Term]]:
    """The dimensions of a tensor of positions. Where nothing uses them, what they point into may change."""
    reason = f"{t.where} looks for a position along it"

    def frozen() -> list[Term]:
        for d in searched:
            u.freeze(terms[d], reason)
        return kept

    return frozen


@rule("argmax", "argmin")
def _arg(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> list[Term]:
    terms = t.dims(self)
    gone = dims_of(dim, len(terms))
    keep_still(t, [terms[d] for d in gone], "looks for a position along it")
    return _kept(terms, gone, keepdim)


@rule("mode", "kthvalue")
def _ranked(t: Tracer, out: Any, *, self: torch.Tensor, dim: int = -1, keepdim: bool = False, **_: Any) -> Any:
    terms = t.dims(self)
    gone = dims_of(dim, len(terms))
    keep_still(t, [terms[d] for d in gone], "counts along it")
    return [_kept(terms, gone, keepdim) for _ in out]


@rule("topk")
def _topk(t: Tracer, out: Any, *, self: torch.Tensor, k: int, dim: int = -1, **_: Any) -> Any:
    terms = t.dims(self)
    if terms:
        keep_still(t, [terms[dim]], "looks for a position along it")
        terms[dim] = int(k)
    return [terms for _ in out]


@rule("cumsum", "cumprod", "sort", "argsort", "logcumsumexp", "_logcumsumexp", "cummax", "cummin")
def _scan(t: Tracer, out: Any, *, self: torch.Tensor, dim: int = -1, **_: Any) -> Any:
    terms = t.dims(self)
    if terms:
        keep_still(t, [terms[dim]], "depends on the order along it")
    return terms if isinstance(out, torch.Tensor) else [terms for _ in out]


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    if terms:
        t.mixed.append(terms[dim])
    return terms


@rule("trace")
def _trace(t: Tracer, out: torch.Tensor, *, self: torch.Tensor) -> list[Term]:
    keep_still(t, t.dims(self), "reads a diagonal of it")
    return []


@rule("renorm")
def _renorm(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    t.mixed += [term for d, term in enumerate(terms) if d != dim % len(terms)]
    return terms


@rule("_weight_norm_interface")
def _weight_norm(t: Tracer, out: Any, *, v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> list[list[Term]]:
    terms, norms = t.dims(v), t.dims(g)
    t.mixed += [term for d, term in enumerate(terms) if d != dim % len(terms)]
    return [broadcast(t, (terms, norms)), norms]


@rule("dist")
def _dist(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, other: torch.Tensor, **_: Any) -> list[Term]:
    t.mixed += elementwise(t, (self, other))
    return []


@rule(
    "mse_loss",
    "huber_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
)
def _loss(t: Tracer, out: torch.Tensor, *, reduction: int = 1, **named: Any) -> list[Term]:
    terms = elementwise(t, [value for value in named.values() if isinstance(value, torch.Tensor)])
    if reduction == 0:
        return terms
    t.mixed += terms
    return []


@rule("nll_loss_forward", "nll_loss2d_forward")
def _nll_loss(
    t: Tracer,
    out: Any,
    *,
    self: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
    **_: Any,
) -> list[list[Term]]:
    terms, places = t.dims(self), t.dims(target)
    at = min(len(terms) - 1, 1)
    classes = terms.pop(at)
    keep_still(t, [classes, *(t.dims(weight) if weight is not None else [])], "looks it up by position")
    for a, b in zip(terms, places, strict=True):
        t.unify(a, b)
    if reduction == 0:
        return [terms, []]
    t.mixed += terms
    return [[], []]


@rule("multinomial")
def _multinomial(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, **_: Any) -> list[Term]:
    *rows, chances = t.dims(self)
    keep_still(t, [chances], "draws positions along it")
    return [*rows, int(out.shape[-1])]

"""Reductions, and operations that depend on the order along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...structure.terms import Term
from ..tracer import Tracer
from .base import dims_of, elementwise, keep_still, rule


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "std",
    "prod",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "any",
    "all",
    "nansum",
    "var_mean",
    "std_mean",
    "max",
    "min",
)
def _reduce(t: Tracer, out: Any, *, self: torch.Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, **named: Any) -> Any:
    if isinstance(named.get("other"), torch.Tensor):
        return elementwise(t, (self, named["other"]))
    terms = t.dims(self)
    gone = dims_of(dim, len(terms))
    t.mixed.extend(terms[d] for d in gone)
    t.reduced.extend(terms[d] for d in gone)
    kept = [1 if i in gone else term for i, term in enumerate(terms) if keepdim or i not in gone]
    if isinstance(out, torch.Tensor):
        return kept
    if torch.is_tensor(out[1]) and not out[1].is_floating_point():
        keep_still(t, [terms[d] for d in gone], "looks for a position along it")
    return [kept for _ in out]


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, dim: int, **_: Any) -> list[Term]:
    terms = t.dims(self)
    t.mixed.append(terms[dim])
    return terms


@rule("cumsum", "cumprod", "sort", "argsort", "logcumsumexp")
def _scan(t: Tracer, out: Any, *, self: torch.Tensor, dim: int = -1, **_: Any) -> Any:
    terms = t.dims(self)
    keep_still(t, [terms[dim]], "depends on the order along it")
    return terms if isinstance(out, torch.Tensor) else [terms for _ in out]


@rule("argmax", "argmin", "topk")
def _arg(t: Tracer, out: Any, *, self: torch.Tensor, dim: int | None = -1, **_: Any) -> Any:
    terms = t.dims(self)
    keep_still(t, terms if dim is None else [terms[dim]], "looks for a position along it")
    return [int(n) for n in out.shape] if isinstance(out, torch.Tensor) else [[int(n) for n in o.shape] for o in out]

"""Looking elements up by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...structure import unify as u
from ...structure.terms import Term
from ..tracer import Tracer
from .base import elementwise, keep_still, rule


@rule("index", "_unsafe_index")
def _index(t: Tracer, out: torch.Tensor, *, self: torch.Tensor, indices: Sequence[torch.Tensor | None], **_: Any) -> list[Term]:
    terms = t.dims(self)
    used = [(d, index) for d, index in enumerate(indices) if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for _, index in used):
        keep_still(t, terms, "selects by a mask")
        return [int(n) for n in out.shape]
    for d, _index in used:
        u.freeze(terms[d], f"{t.where} looks it up by position")
    found = elementwise(t, [index for _, index in used])
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
    keep_still(t, [*terms, *places], "looks it up by position")
    return [int(n) for n in out.shape]

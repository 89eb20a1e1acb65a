"""The table of rules, and what rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...structure import unify as u
from ...structure.terms import Term
from ..tracer import Tracer

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
COSTLY: set[Rule] = set()
"""Rules that run even where no axis is touched: products that still cost, new tensors without operands, and copies along a new dimension,
which may turn out to be one that axes run along."""


def rule(*names: str, costly: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for `aten` operations of these names, overloads included."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        if costly:
            COSTLY.add(function)
        return function

    return register


def broadcast(t: Tracer, rows: Sequence[Sequence[Term]]) -> list[Term]:
    """Broadcasting: dimensions aligned from the right hold the same elements, or have one."""
    terms: list[Term] = [1] * max(map(len, rows), default=0)
    for row in rows:
        for i, term in enumerate(reversed(row), start=1):
            if u.size_of(terms[-i]) == 1:
                terms[-i] = term
            elif u.size_of(term) != 1:
                t.unify(terms[-i], term)
    return terms


def elementwise(t: Tracer, operands: Sequence[torch.Tensor]) -> list[Term]:
    """Elementwise operation with broadcasting."""
    return broadcast(t, [t.dims(operand) for operand in operands])


def number(term: Term) -> Term:
    """A dimension that no method may change, such as a kernel's height: its size as a plain number."""
    for variable in u.variables(term):
        variable.bound = variable.size
    return u.resolve(term)


def keep_still(t: Tracer, terms: Sequence[Term], reason: str) -> None:
    """Freeze dimensions, with a reason that starts with where the model is."""
    for term in terms:
        u.freeze(term, f"{t.where} {reason}")


def dims_of(dim: int | Sequence[int] | None, ndim: int) -> set[int]:
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return set(range(ndim))
    return {d % ndim for d in ([dim] if isinstance(dim, int) else dim)}

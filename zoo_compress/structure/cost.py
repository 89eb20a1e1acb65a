"""Costs as polynomials in the sizes of axes, so that MACs and parameters of any choice of widths are arithmetic."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .terms import Product, Sum, Term

Monomial = tuple[str, ...]


def monomials(term: Term) -> Counter[Monomial]:
    """Expand the size of a term into monomials: `(a + 2) b` is {(a, b): 1, (b,): 2}."""
    if isinstance(term, int):
        return Counter({(): term})
    if isinstance(term, Sum):
        total: Counter[Monomial] = Counter()
        for part in term.terms:
            total.update(monomials(part))
        return total
    if isinstance(term, Product):
        expanded: Counter[Monomial] = Counter({(): 1})
        for factor in term.factors:
            terms: Counter[Monomial] = Counter()
            for left, m in expanded.items():
                for right, n in monomials(factor).items():
                    terms[tuple(sorted(left + right))] += m * n
            expanded = terms
        return expanded
    return Counter({(str(term),): 1})


class Polynomial:
    """Sum of counted term sizes, evaluated in microseconds.

    Args:
        terms: (term, count) pairs; the value is the sum of count × size(term).
        names: The axes, in the order of the size vectors given to `__call__`.
    """

    def __init__(self, terms: Iterable[tuple[Term, float]], names: Sequence[str]) -> None:
        total: defaultdict[Monomial, float] = defaultdict(int)
        for term, count in terms:
            for monomial, coefficient in monomials(term).items():
                total[monomial] += coefficient * count
        self.names = tuple(names)
        position = {name: i for i, name in enumerate(self.names)}
        degree = max(map(len, total), default=0)
        # The vector of sizes gets a 1 appended; monomials of lower degree point at it.
        self._index = np.full((len(total), max(degree, 1)), len(self.names), dtype=np.int64)
        for row, monomial in enumerate(total):
            self._index[row, : len(monomial)] = [position[name] for name in monomial]
        self._coefficients = np.array(list(total.values()), dtype=np.float64)

    def __call__(self, sizes: Mapping[str, int] | np.ndarray) -> int:
        """Value at the given sizes: a mapping from every axis, or a vector in the order of `names`."""
        vector = sizes if isinstance(sizes, np.ndarray) else np.array([sizes[name] for name in self.names], dtype=np.float64)
        extended = np.append(vector.astype(np.float64), 1.0)
        return round(float(extended[self._index].prod(axis=1) @ self._coefficients))

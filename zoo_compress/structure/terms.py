"""Terms: one notation for what the elements along a dimension are.

A term is an axis name, a fixed number, a product of terms (row-major, slowest first) or a sum of terms (concatenation in order):

    >>> term = parse("3 heads dim")
    >>> size(term, {"heads": 2, "dim": 4})
    24
    >>> str(parse("(a + b) c"))
    'a c + b c'
    >>> index(parse("a + 2"), {"a": 3}, {"a": [2, 0]})
    array([2, 0, 3, 4])

The atoms of a term are integers and axes. An axis is a name in a finished layout and a variable while one is inferred
(`structure.unify`); every function here takes both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np

from ..errors import CompressError

Axis: TypeAlias = Any  # hashable: a name, or a variable of the unifier
Term: TypeAlias = "int | Axis | Product | Sum"


@dataclass(frozen=True, slots=True)
class Product:
    """Row-major product, slowest factor first. Build with `product`, which keeps the normal form."""

    factors: tuple[Term, ...]

    def __str__(self) -> str:
        return " ".join(f"({f})" if isinstance(f, Sum) else str(f) for f in self.factors)


@dataclass(frozen=True, slots=True)
class Sum:
    """Concatenation in order. Build with `concat`, which keeps the normal form."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return " + ".join(str(t) for t in self.terms)


def factors(term: Term) -> tuple[Term, ...]:
    """The factors of a term, slowest first; a term that is no product is its own only factor, and 1 has none."""
    if isinstance(term, Product):
        return term.factors
    return () if term == 1 else (term,)


def segments(term: Term) -> tuple[Term, ...]:
    """The concatenated parts of a term, in order."""
    return term.terms if isinstance(term, Sum) else (term,)


def product(*terms: Term) -> Term:
    """Product in normal form: flat, adjacent numbers merged, and a slowest sum distributed: (a + b) c = a c + b c."""
    flat = _merge((f for t in terms for f in factors(t)), math.prod)
    flat = [f for f in flat if f != 1]
    if len(flat) > 1 and isinstance(flat[0], Sum):
        return concat(*(product(t, *flat[1:]) for t in flat[0].terms))
    if len(flat) > 1:
        return Product(tuple(flat))
    return flat[0] if flat else 1


def concat(*terms: Term) -> Term:
    """Sum in normal form: flat, adjacent numbers merged, and equal parts counted: a + a = 2 a."""
    flat = _merge((s for t in terms for s in segments(t)), sum)
    flat = [s for s in flat if s != 0]
    if len(flat) > 1 and all(s == flat[0] for s in flat):
        return product(len(flat), flat[0])
    if len(flat) > 1:
        return Sum(tuple(flat))
    return flat[0] if flat else 0


def _merge(terms: Iterable[Term], fold: Callable[[Iterable[int]], int]) -> list[Term]:
    merged: list[Term] = []
    for is_number, run in groupby(terms, key=lambda t: isinstance(t, int)):
        parts = list(run)
        merged.extend([fold(parts)] if is_number else parts)  # type: ignore[arg-type]
    return merged


def axes(term: Term) -> Iterator[Axis]:
    """Every axis that occurs in a term, in order, repeated as often as it occurs."""
    if isinstance(term, (Product, Sum)):
        for part in term.factors if isinstance(term, Product) else term.terms:
            yield from axes(part)
    elif not isinstance(term, int):
        yield term


def substitute(term: Term, values: Callable[[Axis], Term]) -> Term:
    """Replace each axis by a term and bring the result to normal form."""
    if isinstance(term, Product):
        return product(*(substitute(f, values) for f in term.factors))
    if isinstance(term, Sum):
        return concat(*(substitute(t, values) for t in term.terms))
    return term if isinstance(term, int) else values(term)


def size(term: Term, sizes: Mapping[Axis, int]) -> int:
    """Number of elements along a dimension that a term describes."""
    if isinstance(term, int):
        return term
    if isinstance(term, Product):
        return math.prod(size(f, sizes) for f in term.factors)
    if isinstance(term, Sum):
        return sum(size(t, sizes) for t in term.terms)
    return sizes[term]


def index(term: Term, sizes: Mapping[Axis, int], pick: Mapping[Axis, Sequence[int] | np.ndarray]) -> np.ndarray:
    """Positions along a dimension that remain, in their new order, when each axis `a` in `pick` keeps `pick[a]`.

    Args:
        term: What the dimension is.
        sizes: Size of every axis before the choice.
        pick: For some axes the indices kept, in their new order. The others stay as they are.

    Returns:
        Integer array (new size,) of positions in the old dimension.
    """
    if isinstance(term, int):
        return np.arange(term)
    if isinstance(term, Product):
        out = np.zeros(1, dtype=np.int64)
        for factor in term.factors:
            out = (out[:, None] * size(factor, sizes) + index(factor, sizes, pick)).reshape(-1)
        return out
    if isinstance(term, Sum):
        offsets = np.cumsum([0, *(size(t, sizes) for t in term.terms)])
        return np.concatenate([index(t, sizes, pick) + o for t, o in zip(term.terms, offsets, strict=False)])
    return np.asarray(pick[term], dtype=np.int64) if term in pick else np.arange(sizes[term])


def labels(term: Term, sizes: Mapping[Axis, int], axis: Axis) -> np.ndarray:
    """Which element of `axis` each position along a dimension belongs to.

    Returns:
        Integer array (size of the term,); -1 at positions that the axis does not run through.
    """
    if isinstance(term, Sum):
        return np.concatenate([labels(t, sizes, axis) for t in term.terms])
    if isinstance(term, Product):
        out = np.full(1, -1)
        for factor in term.factors:
            inner = labels(factor, sizes, axis)
            out = np.where(out[:, None] >= 0, out[:, None], inner).reshape(-1)
        return out
    return np.arange(sizes[term]) if term == axis else np.full(size(term, sizes), -1)


def positions(term: Term, sizes: Mapping[Axis, int], axis: Axis) -> np.ndarray:
    """The places of each element of `axis` along a dimension.

    Returns:
        Integer array (size of the axis, places of one element), places ascending; (0, 0) where the axis does not run along it.
    """
    found = labels(term, sizes, axis)
    places = np.flatnonzero(found >= 0)
    if len(places) == 0:
        return np.empty((0, 0), dtype=np.int64)
    return places[np.argsort(found[places], kind="stable")].reshape(sizes[axis], -1)


_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_]\w*)|([()+]))")
MAX_DEPTH = 32


def parse(text: str) -> Term:
    """Read a term: `term := product (" + " product)*`, `product := atom (" " atom)*`, `atom := INT | NAME | "(" term ")"`.

    Raises:
        CompressError: If `text` is not such a term, or nests deeper than `MAX_DEPTH`.
    """
    if not isinstance(text, str):
        raise CompressError(f"term: expected a string such as '3 h d', found {type(text).__name__} {text!r}")
    tokens: list[str] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise CompressError(f"term {text!r}: unexpected character {text[position]!r} at {position}")
        tokens.append(match[0].strip())
        position = match.end()
    term, rest = _parse_sum(tokens, text, 0)
    if rest:
        raise CompressError(f"term {text!r}: unexpected {rest[0]!r}")
    return term


def _parse_sum(tokens: list[str], text: str, depth: int) -> tuple[Term, list[str]]:
    term, tokens = _parse_product(tokens, text, depth)
    parts = [term]
    while tokens and tokens[0] == "+":
        term, tokens = _parse_product(tokens[1:], text, depth)
        parts.append(term)
    return concat(*parts), tokens


def _parse_product(tokens: list[str], text: str, depth: int) -> tuple[Term, list[str]]:
    atoms: list[Term] = []
    while tokens and tokens[0] not in "+)":
        token, tokens = tokens[0], tokens[1:]
        if token == "(":
            if depth >= MAX_DEPTH:
                raise CompressError(f"term {text[:40]!r}…: nested deeper than {MAX_DEPTH}")
            inner, tokens = _parse_sum(tokens, text, depth + 1)
            if not tokens or tokens[0] != ")":
                raise CompressError(f"term {text!r}: a parenthesis is not closed")
            tokens = tokens[1:]
            atoms.append(inner)
        else:
            atoms.append(int(token) if token.isdigit() else token)
    if not atoms:
        raise CompressError(f"term {text!r}: expected an axis or a number, found {tokens[0] if tokens else 'nothing'!r}")
    return product(*atoms), tokens

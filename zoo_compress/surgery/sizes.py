"""Integers that remember which sizes they were computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..structure.terms import Term, concat, product

_on_equal: Callable[[Size, Size], None] | None = None


@contextmanager
def equalities(listener: Callable[[Size, Size], None] | None) -> Iterator[None]:
    """Within, `listener` hears of every two `Size`s that are compared and found equal; None hears nothing."""
    global _on_equal
    before, _on_equal = _on_equal, listener
    try:
        yield
    finally:
        _on_equal = before


class Size(int):
    """An `int` equal to (size(term) - size(less)) / size(over).

    Sizes read from tensors and from module attributes are given to the model as `Size`, so that `reshape(B, N, C // self.num_heads)`
    still tells, when it is reached, where each number came from. Sums, differences, products and exact quotients keep the expression;
    anything else gives a plain `int`, which the tracer treats as a constant of the code. What the model's own code finds equal
    (`assert C == self.dim`) has to stay equal.
    """

    term: Term
    less: Term
    over: Term

    def __new__(cls, value: int, term: Term, less: Term = 0, over: Term = 1) -> Size:
        self = super().__new__(cls, value)
        self.term, self.less, self.over = term, less, over
        return self

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True and _on_equal is not None and isinstance(other, Size):
            _on_equal(self, other)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __neg__(self) -> Size:
        return Size(-int(self), self.less, self.term, self.over)

    def __add__(self, other: Any) -> Any:
        return _add(self, other, int.__add__(self, other))

    def __radd__(self, other: Any) -> Any:
        return _add(other, self, int.__radd__(self, other))

    def __sub__(self, other: Any) -> Any:
        return _add(self, -other, int.__sub__(self, other)) if isinstance(other, int) else NotImplemented

    def __rsub__(self, other: Any) -> Any:
        return _add(other, -self, int.__rsub__(self, other)) if isinstance(other, int) else NotImplemented

    def __mul__(self, other: Any) -> Any:
        return _multiply(self, other, int.__mul__(self, other))

    def __rmul__(self, other: Any) -> Any:
        return _multiply(other, self, int.__rmul__(self, other))

    def __floordiv__(self, other: Any) -> Any:
        return _divide(self, other, int.__floordiv__(self, other))

    def __rfloordiv__(self, other: Any) -> Any:
        return _divide(other, self, int.__rfloordiv__(self, other))


def expression(value: int) -> tuple[Term, Term, Term]:
    """(term, less, over) of a `Size` or a plain number."""
    if isinstance(value, Size):
        return value.term, value.less, value.over
    return (int(value), 0, 1) if value >= 0 else (0, -int(value), 1)


def _add(a: Any, b: Any, value: Any) -> Any:
    if value is NotImplemented or not (isinstance(a, int) and isinstance(b, int)):
        return value
    (term_a, less_a, over_a), (term_b, less_b, over_b) = expression(a), expression(b)
    if over_a != over_b:
        return value
    return Size(value, concat(term_a, term_b), concat(less_a, less_b), over_a)


def _multiply(a: Any, b: Any, value: Any) -> Any:
    if value is NotImplemented or not (isinstance(a, int) and isinstance(b, int)):
        return value
    (term_a, less_a, over_a), (term_b, less_b, over_b) = expression(a), expression(b)
    if less_a != 0 and less_b != 0:
        return value
    less = product(less_a, term_b) if less_a != 0 else product(term_a, less_b) if less_b != 0 else 0
    return Size(value, product(term_a, term_b), less, product(over_a, over_b))


def _divide(a: Any, b: Any, value: Any) -> Any:
    if value is NotImplemented or not (isinstance(a, int) and isinstance(b, int)) or int(value) * int(b) != int(a):
        return value
    (term_a, less_a, over_a), (term_b, less_b, over_b) = expression(a), expression(b)
    if less_b != 0:
        return value
    return Size(value, product(term_a, over_b), product(less_a, over_b) if less_a != 0 else 0, product(over_a, term_b))

"""Numbers that remember which sizes they were computed from."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias

from ..structure import unify as u
from ..structure.terms import Term, concat, factors, product, segments, substitute


class Listener(Protocol):
    """Hears what a model's own code does with numbers that were computed from sizes."""

    hashable: bool

    def equal(self, a: Size, b: Size) -> None:
        """Two numbers were compared and found equal."""

    def combine(self, setting: Setting) -> None:
        """A module's float attribute goes into arithmetic, where it cannot be followed."""

    def keep(self, terms: tuple[Term, ...], reason: str, unless: Callable[[], bool] | None = None) -> None:
        """Sizes may not change, because of what became of numbers computed from them, unless something holds when all is known."""


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """Within, in this thread, a listener hears what is done with numbers that were computed from sizes; None hears nothing."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class UnhashableError(TypeError):
    """A `Size` was used as a key, of a cache as a rule. Who gives torch's symbolic numbers a way around caches gives it to these."""


class _Remembering:
    """What numbers have in common that know their origin: where they leave Python's arithmetic, the sizes they came from are kept."""

    __slots__ = ()

    def __hash__(self) -> int:
        listener = _listener.get()
        if listener is not None and not listener.hashable:
            raise UnhashableError("a number computed from a width is used as a key")
        _lost(self, "looks it up in a dictionary, a set or a cache")
        return hash(plain(self))

    def __int__(self) -> int:
        _lost(self, "computes an integer from it")
        return int(plain(self))

    def __float__(self) -> float:
        _lost(self, "computes a number from it")
        return float(plain(self))

    def __repr__(self) -> str:
        _lost(self, "writes it into a text")
        return repr(plain(self))

    def __format__(self, spec: str) -> str:
        _lost(self, "writes it into a text")
        return format(plain(self), spec)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **named: Any) -> Any:
        for value in inputs:
            _lost(value, "computes a number from it in NumPy")
        return getattr(ufunc, method)(*map(plain, inputs), **named)

    def __reduce__(self) -> Any:
        return type(plain(self)), (plain(self),)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __bool__(self) -> bool:
        return self != 0

    def is_integer(self) -> bool:
        _decided(self, 0, "asks whether it is a whole number", None)
        return plain(self).is_integer()

    def as_integer_ratio(self) -> tuple[int, int]:
        _lost(self, "computes integers from it")
        return plain(self).as_integer_ratio()

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self


class Size(_Remembering, int):  # type: ignore[misc]
    """An `int` equal to (size(term) - size(less)) / size(over).

    Sizes read from tensors and from module attributes are given to the model as `Size`, so that `reshape(B, N, C // self.num_heads)`
    still tells, when it is reached, where each number came from. Sums, differences, products and exact quotients keep the expression;
    anything else gives a `Computed` number, which only remembers what it came from. What the model's own code finds equal
    (`assert C == self.dim`) has to stay equal.
    """

    term: Term
    less: Term
    over: Term

    def __new__(cls, value: int, term: Term, less: Term = 0, over: Term = 1) -> Size:
        self = super().__new__(cls, value)
        self.term, self.less, self.over = term, less, over
        return self

    def __neg__(self) -> Size:
        return Size(-plain(self), self.less, self.term, self.over)

    def __pos__(self) -> Size:
        return self

    __trunc__ = __floor__ = __ceil__ = conjugate = __pos__
    real = numerator = property(__pos__)

    def __round__(self, digits: Any = None) -> Any:
        return self if digits is None or digits >= 0 else _computed(round(plain(self), digits), self)

    def __abs__(self) -> Any:
        return self if self.less == 0 else _computed(abs(plain(self)), self)

    def __invert__(self) -> Size:
        return -self - 1

    def __add__(self, other: Any) -> Any:
        return _exact(operator.add, _add, self, other)

    def __radd__(self, other: Any) -> Any:
        return _exact(operator.add, _add, other, self)

    def __sub__(self, other: Any) -> Any:
        return _exact(operator.sub, lambda a, b: _add(a, -b), self, other)

    def __rsub__(self, other: Any) -> Any:
        return _exact(operator.sub, lambda a, b: _add(a, -b), other, self)

    def __mul__(self, other: Any) -> Any:
        return _exact(operator.mul, _multiply, self, other)

    def __rmul__(self, other: Any) -> Any:
        return _exact(operator.mul, _multiply, other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _exact(operator.floordiv, _divide, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _exact(operator.floordiv, _divide, other, self)

    def __truediv__(self, other: Any) -> Any:
        return _quotient(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _quotient(other, self)

    def __lshift__(self, other: Any) -> Any:
        return self * (1 << other) if type(other) is int else _inexact(operator.lshift, self, other)

    def __rshift__(self, other: Any) -> Any:
        return self // (1 << other) if type(other) is int else _inexact(operator.rshift, self, other)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        if modulo is None and type(other) is int and 1 <= other <= 4:
            return math.prod([self] * other)
        return _power(self, other) if modulo is None else _computed(pow(plain(self), plain(other), plain(modulo)), self, other, modulo)


class Computed(_Remembering):
    """A number of which only is known which sizes it was computed from.

    Attributes:
        origins: Terms of those sizes.
        power: (size, exponent) where the number is a power of a size.
        remainder: (a, b) where the number is the remainder of a / b and nothing remains.
        quotient: The `Size` that the number equals where it is an exact quotient.
    """

    origins: tuple[Term, ...] = ()
    power: tuple[Any, float] | None = None
    remainder: tuple[Any, Any] | None = None
    quotient: Size | None = None

    def __round__(self, digits: int | None = None) -> Any:
        return self.quotient if digits is None and self.quotient is not None else _computed(round(plain(self), digits), self)

    def __floor__(self) -> Any:
        return _computed(math.floor(plain(self)), self) if self.quotient is None else self.quotient

    def __ceil__(self) -> Any:
        return _computed(math.ceil(plain(self)), self) if self.quotient is None else self.quotient

    def __trunc__(self) -> Any:
        return _computed(math.trunc(plain(self)), self) if self.quotient is None else self.quotient

    def __pos__(self) -> Any:
        return self

    def __neg__(self) -> Any:
        return _computed(-plain(self), self)

    def __abs__(self) -> Any:
        return _computed(abs(plain(self)), self)

    def __invert__(self) -> Any:
        return _computed(~plain(self), self)

    def __rtruediv__(self, other: Any) -> Any:
        value = _inexact(operator.truediv, other, self)
        if self.power is not None and type(other) in (int, float) and other == 1:
            value.power = self.power[0], -self.power[1]
        return value

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return _power(self, other) if modulo is None else _computed(pow(plain(self), plain(other), plain(modulo)), self, other, modulo)


class ComputedInt(Computed, int):  # type: ignore[misc]
    """An `int` of which only is known which sizes it was computed from."""


class ComputedFloat(Computed, float):  # type: ignore[misc]
    """A `float` of which only is known which sizes it was computed from."""


class Setting(ComputedFloat):
    """The value of a module's float attribute, which may be the scale of an attention.

    Attributes:
        path: `module.path.attr`.
    """

    path = ""


Number: TypeAlias = "Size | Computed"


def plain(number: Any) -> Any:
    """A number without its memory; anything else as it is."""
    if isinstance(number, (Size, ComputedInt)):
        return int.__int__(number)
    return float.__float__(number) if isinstance(number, ComputedFloat) else number


def origins(number: Any) -> tuple[Term, ...]:
    """Terms of the sizes that a number was computed from."""
    if isinstance(number, Size):
        return number.term, number.less, number.over
    return number.origins if isinstance(number, Computed) else ()


def expression(value: int) -> tuple[Term, Term, Term]:
    """(term, less, over) of a `Size` or a plain number."""
    if isinstance(value, Size):
        return value.term, value.less, value.over
    return (int(value), 0, 1) if value >= 0 else (0, -int(value), 1)


def sides(a: int, b: int) -> tuple[Term, Term]:
    """Two terms whose sizes compare as two numbers do, each a `Size` or plain."""
    (term_a, less_a, over_a), (term_b, less_b, over_b) = expression(a), expression(b)
    return concat(product(term_a, over_b), product(less_b, over_a)), concat(product(term_b, over_a), product(less_a, over_b))


def _computed(value: Any, *numbers: Any) -> Any:
    """The result of arithmetic, remembering what it was computed from."""
    terms = tuple(dict.fromkeys(term for number in numbers for term in origins(number) if not isinstance(term, int)))
    if not terms or not isinstance(value, (int, float)):
        for number in numbers:
            _lost(number, "computes a number from it")
        return value
    result = (ComputedFloat if isinstance(value, float) else ComputedInt)(value)
    result.origins = terms
    return result


def _inexact(operation: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """Arithmetic whose result keeps no expression; with what is no number, the other operand decides."""
    other = b if isinstance(a, _Remembering) else a
    if isinstance(other, (list, tuple, str, bytes)) and operation is operator.mul:
        _lost(a, "repeats a list")
        _lost(b, "repeats a list")
    elif not isinstance(other, (int, float)):
        return NotImplemented
    return _computed(operation(plain(a), plain(b)), a, b)


def _exact(operation: Callable[[Any, Any], Any], expressed: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """Arithmetic on two numbers, with the expression of the result where both have one and it exists."""
    found = expressed(a, b) if all(isinstance(n, int) and not isinstance(n, Computed) for n in (a, b)) else None
    if found is None:
        return _inexact(operation, a, b)
    term, less, over = found
    return Size(operation(plain(a), plain(b)), term, less, over)


def _add(a: Any, b: Any) -> tuple[Term, Term, Term] | None:
    (term_a, less_a, over_a), (term_b, less_b, over_b) = expression(a), expression(b)
    return (concat(term_a, term_b), concat(less_a, less_b), over_a) if over_a == over_b else None


def _multiply(a: Any, b: Any) -> tuple[Term, Term, Term] | None:
    (term_a, less_a, over_a), (term_b, less_b, over_b) = expression(a), expression(b)
    if less_a != 0 and less_b != 0:
        return None
    less = product(less_a, term_b) if less_a != 0 else product(term_a, less_b) if less_b != 0 else 0
    return product(term_a, term_b), less, product(over_a, over_b)


def _divide(a: Any, b: Any) -> tuple[Term, Term, Term] | None:
    (term_a, less_a, over_a), (term_b, less_b, over_b) = expression(a), expression(b)
    if less_b != 0 or term_b == 0 or plain(a) % plain(b):
        return None
    return product(term_a, over_b), product(less_a, over_b) if less_a != 0 else 0, product(over_a, term_b)


def _quotient(a: Any, b: Any) -> Any:
    value = _inexact(operator.truediv, a, b)
    if isinstance(value, Computed):
        exact = _exact(operator.floordiv, _divide, a, b)
        value.quotient = exact if isinstance(exact, Size) else None
    return value


def _power(a: Any, b: Any) -> Any:
    value = _inexact(operator.pow, a, b)
    base, exponent = (a, 1.0) if isinstance(a, Size) else getattr(a, "power", None) or (None, 1.0)
    if isinstance(value, Computed) and base is not None and type(b) in (int, float):
        value.power = base, exponent * b
    return value


def _remainder(a: Any, b: Any) -> Any:
    value = _inexact(operator.mod, a, b)
    if isinstance(value, Computed) and plain(value) == 0:
        value.remainder = a, b
    return value


def _operators() -> None:
    """Give the numbers the operators that keep no expression, and comparisons."""
    for cls, base in ((Size, int), (ComputedInt, int), (ComputedFloat, float)):
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"):
            apply = _remainder if name == "mod" else _power if name == "pow" else _inexact_of(getattr(operator, f"__{name}__"))
            for special, swapped in ((f"__{name}__", False), (f"__r{name}__", True)):
                if hasattr(base, special) and not any(special in vars(c) for c in cls.__mro__[: cls.__mro__.index(base)]):
                    setattr(cls, special, _method(apply, swapped))
        for name, sign in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
            setattr(cls, f"__{name}__", _comparison(getattr(operator, name), sign))
        cls.__hash__ = _Remembering.__hash__  # type: ignore[method-assign]
    for cls in (Size, ComputedInt):
        for name in ("bit_length", "bit_count", "to_bytes"):
            setattr(cls, name, _losing(getattr(int, name)))


def _inexact_of(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: _inexact(operation, a, b)


def _method(apply: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Any, Any], Any]:
    return (lambda self, other: apply(other, self)) if swapped else (lambda self, other: apply(self, other))


def _comparison(compare: Callable[[Any, Any], bool], sign: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        answer = compare(plain(self), plain(other))
        _decided(self, other, sign, answer)
        return answer

    return method


def _losing(function: Any) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **named: Any) -> Any:
        _lost(self, "computes integers from it")
        return function(self, *args, **named)

    return method


def _lost(number: Any, how: str) -> None:
    """A number that was computed from sizes goes where it cannot be followed."""
    listener = _listener.get()
    if listener is not None and isinstance(number, Setting):
        listener.combine(number)
    elif listener is not None and (terms := origins(number)):
        listener.keep(terms, f"the model's code {how}")


def _decided(a: Any, b: Any, sign: str, answer: bool | None) -> None:
    """The model's code has compared numbers, and goes on as it does because of the answer."""
    listener = _listener.get()
    if listener is None or _asked_by_a_library():
        return
    if isinstance(a, Size) and isinstance(b, Size) and plain(a) == plain(b) and sign in ("==", "!="):
        listener.equal(a, b)
        return
    question = f"({plain(a)} {sign} {plain(b)})" if answer is not None else f"({sign})"
    listener.keep((*origins(a), *origins(b)), f"the model's code compares it {question}", lambda: _holds(a, b, sign))


def _asked_by_a_library() -> bool:
    """Whether it is not the model's code that compares: torch checks arguments and chooses faster ways to the same result."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).partition(".")[0] in ("torch", __name__.partition(".")[0])


def _holds(a: Any, b: Any, sign: str) -> bool:
    """Whether two numbers compare at any choice of widths as they do now."""
    if isinstance(a, Computed) and a.remainder is not None and type(b) is int and b == 0:
        return _divides(*a.remainder)
    if not all(isinstance(n, int) and not isinstance(n, Computed) for n in (a, b)):
        return False
    big, small = (u.resolve(side) for side in sides(a, b))
    may_equal = sign in (">=", "<")
    if plain(a) < plain(b):
        big, small, may_equal = small, big, sign in ("<=", ">")
    rest, kept = list(segments(big)), 0
    for part in segments(small):
        if part in rest:
            rest.remove(part)
        elif isinstance(part, int):
            kept += part
        else:
            return False
    least = _least(concat(*rest))
    return big == small or least > kept or (may_equal and least == kept)


def _least(term: Term) -> int:
    """Size of a term where every axis that may change has one element."""
    return u.size_of(substitute(term, lambda v: v.size if v.frozen else 1))


def _divides(a: Any, b: Any) -> bool:
    """Whether b divides a at any choice of widths."""
    if not all(isinstance(n, int) and not isinstance(n, Computed) for n in (a, b)):
        return False
    (term, less, over), (divisor, less_b, over_b) = ((u.resolve(t) for t in expression(n)) for n in (a, b))
    if less != 0 or less_b != 0 or over != 1:
        return False
    return all(_multiple(part, divisor) for part in segments(product(term, over_b)))


def _multiple(term: Term, divisor: Term) -> bool:
    """Whether a product has all the factors of another."""
    left, number = list(factors(term)), 1
    for factor in factors(divisor):
        if factor in left and not isinstance(factor, int):
            left.remove(factor)
        elif u.is_free(factor):
            return False
        else:
            number *= u.size_of(factor)
    return math.prod(u.size_of(factor) for factor in left if not u.is_free(factor)) % number == 0


_operators()

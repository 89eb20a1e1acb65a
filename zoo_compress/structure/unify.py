"""Unification of terms: the type inference under every layout.

Terms here have `Variable`s for axes. `Unifier.unify` makes two terms of equal size equal, element by element, by binding variables to
each other, splitting one into a product or cutting it into a sum. What cannot be made equal that way is frozen: the variables keep their
size and order for ever, which is always sound, since every term then stands for the same positions as before.
"""

from __future__ import annotations

from itertools import count

from .terms import Product, Sum, Term, axes, concat, factors, product, segments, substitute
from .terms import size as term_size

_serial = count()


class Variable:
    """An axis whose structure is still being inferred.

    Attributes:
        size: Number of elements.
        bound: The term it turned out to be, once known.
        frozen: Why it may not change, or None.
        ordered: Whether its order matters, so that it can be pruned but not permuted.
        hint: First letter of the name it will get.
        piece: Whether it was split off another axis; a piece that the code writes as a plain number becomes that number.
        uniform: Whether all elements along it are alike (copies, zeros), so that it may become whatever it meets.
        attribute: `module.path.attr` where the variable stands for the value of a module's attribute.
    """

    __slots__ = ("attribute", "bound", "frozen", "hint", "ordered", "piece", "serial", "size", "uniform")

    def __init__(self, size: int, *, hint: str = "", piece: bool = False, attribute: str | None = None) -> None:
        self.size = size
        self.hint = hint
        self.piece = piece
        self.attribute = attribute
        self.bound: Term | None = None
        self.frozen: str | None = None
        self.ordered = False
        self.uniform = False
        self.serial = next(_serial)

    def __repr__(self) -> str:
        return f"{self.hint or 'v'}{self.serial}[{self.size}]"

    def part(self, size: int) -> Variable:
        """A new variable for a piece of this one, with its flags."""
        part = Variable(size, hint=self.hint, piece=True)
        part.frozen, part.ordered = self.frozen, self.ordered
        return part


class _Sizes:
    """Mapping from a variable to its size, as `terms.size` wants it."""

    def __getitem__(self, variable: Variable) -> int:
        return variable.size


SIZES = _Sizes()


def size_of(term: Term) -> int:
    """Number of elements of a term over variables."""
    return term_size(term, SIZES)  # type: ignore[arg-type]


def resolve(term: Term) -> Term:
    """The term with every bound variable replaced, in normal form."""
    if isinstance(term, int):
        return term
    if isinstance(term, Variable):
        if term.size == 1:
            return 1
        if term.bound is None:
            return term
        term.bound = resolve(term.bound)
        return term.bound
    if all(variable.bound is None and variable.size > 1 for variable in axes(term)):
        return term
    return substitute(term, resolve)


def variables(term: Term) -> list[Variable]:
    """Free variables of a term, in order."""
    return list(axes(resolve(term)))


def freeze(term: Term, reason: str) -> None:
    """Keep every axis of the term as it is, for a reason a user can read. The first reason stays."""
    for variable in variables(term):
        if variable.frozen is None:
            variable.frozen = reason


def is_free(term: Term) -> bool:
    """Whether some axis of the term may change."""
    return any(variable.frozen is None for variable in variables(term))


def order(term: Term) -> None:
    """Mark that the order along the term matters."""
    for variable in variables(term):
        variable.ordered = True


def fix(term: Term, reason: str) -> None:
    """The model writes this size as a plain number: pieces become that number, whole axes are frozen with the reason."""
    for variable in variables(term):
        if variable.piece and not variable.frozen:
            variable.bound = variable.size
        elif variable.frozen is None:
            variable.frozen = reason


def unify(a: Term, b: Term, reason: str) -> None:
    """Make two terms equal element by element; where that is impossible, freeze both.

    Products are aligned factor by factor and sums segment by segment, from the left and, where that stops, from the right; a variable is
    split or cut where a boundary of the other side falls inside it.

    Args:
        a: A term.
        b: Another term with as many elements.
        reason: Where they met, for the message on axes that had to be frozen.
    """
    pending = [(a, b)]
    while pending:
        a, b = (resolve(term) for term in pending.pop())
        if a == b:
            continue
        if size_of(a) != size_of(b):
            raise AssertionError(f"{reason}: cannot unify {a!r} of size {size_of(a)} with {b!r} of size {size_of(b)}")
        if isinstance(b, Variable):
            a, b = b, a
        if isinstance(a, Variable):
            _bind(a, b, reason)
        elif isinstance(a, int) or isinstance(b, int):
            freeze(b if isinstance(a, int) else a, reason)
        elif (aligned := _align(a, b)) is not None:
            pending.extend(aligned)
        else:
            message = f"{reason}: {_shape(a)} and {_shape(b)} do not align"
            freeze(a, message)
            freeze(b, message)


def _bind(variable: Variable, term: Term, reason: str) -> None:
    if isinstance(term, int):
        freeze(variable, reason)
        return
    if isinstance(term, Variable):
        if term.uniform and not variable.uniform:
            variable, term = term, variable
        term.piece = term.piece and variable.piece
        term.hint = term.hint or variable.hint
    if variable.frozen is not None:
        freeze(term, variable.frozen)
    if variable.ordered:
        order(term)
    variable.bound = term


def _align(a: Term, b: Term) -> list[tuple[Term, Term]] | None:
    """Break two sums or products into a pair of equal-sized ends and the pair of what is left; None if no end fits."""
    is_sum = isinstance(a, Sum) or isinstance(b, Sum)
    parts, join = (segments, concat) if is_sum else (factors, product)
    for end in (0, -1):
        left, right = list(parts(a)), list(parts(b))
        x, y = size_of(left[end]), size_of(right[end])
        big, small = (left, min(x, y)) if x > y else (right, min(x, y))
        if x != y:
            whole = max(x, y)
            at = small if end == 0 else whole - small if is_sum else whole // small
            pieces = cut(big[end], at) if is_sum else split(big[end], at)
            if pieces is None or size_of(pieces[end]) != small:
                continue
            position = 0 if end == 0 else len(big) - 1
            big[position : position + 1] = pieces
        ends = (left.pop(end), right.pop(end))
        return [(join(*left), join(*right)), ends]
    return None


def split(term: Term, outer: int) -> tuple[Term, Term] | None:
    """Split into a row-major product (outer, rest); None where the size does not divide or a product would have to be regrouped."""
    term = resolve(term)
    total = size_of(term)
    if total % outer:
        return None
    if isinstance(term, int):
        return outer, total // outer
    if isinstance(term, Variable):
        pieces = term.part(outer), term.part(total // outer)
        term.bound = product(*pieces)
        return pieces
    if isinstance(term, Sum):
        pieces = Variable(outer, piece=True), Variable(total // outer, piece=True)
        unify(term, product(*pieces), "split of a concatenation")
        return pieces
    return None


def cut(term: Term, at: int) -> tuple[Term, Term] | None:
    """Cut into a concatenation (first `at` elements, rest); None where the cut would fall inside a row of a product."""
    term = resolve(term)
    total = size_of(term)
    if at in (0, total):
        return (0, term) if at == 0 else (term, 0)
    if isinstance(term, int):
        return at, total - at
    if isinstance(term, Variable):
        pieces = term.part(at), term.part(total - at)
        term.bound = concat(*pieces)
        return pieces
    if isinstance(term, Product):
        outer, *inner = term.factors
        row = size_of(product(*inner))
        halves = cut(outer, at // row) if at % row == 0 else None
        return None if halves is None else (product(halves[0], *inner), product(halves[1], *inner))
    before: list[Term] = []
    rest = list(segments(term))
    while size_of(rest[0]) <= at:
        at -= size_of(rest[0])
        before.append(rest.pop(0))
    halves = cut(rest[0], at)
    return None if halves is None else (concat(*before, halves[0]), concat(halves[1], *rest[1:]))


def regroup(terms: list[Term], sizes: list[int], reason: str) -> list[Term]:
    """Read the elements of row-major dimensions `terms` as dimensions of other sizes: what `view` does.

    Args:
        terms: One term per old dimension.
        sizes: The new dimensions' sizes, with the same product.
        reason: Where this happens, for axes that cannot be regrouped and are frozen.

    Returns:
        One term per new dimension.
    """
    rest: list[Term] = [f for term in terms for f in factors(resolve(term))]
    out: list[Term] = []
    for size in sizes:
        group: list[Term] = []
        missing = size
        while missing > 1:
            head, *inner = factors(resolve(rest.pop(0))) or (1,)
            rest[:0] = inner
            if missing % size_of(head) == 0:
                group.append(head)
                missing //= size_of(head)
                continue
            pieces = split(head, missing) if size_of(head) % missing == 0 else None
            if pieces is None:
                left = product(head, *rest)
                freeze(product(left, *group), f"{reason}: {_shape(left)} cannot be read as sizes {tuple(sizes)}")
                return [*out, *sizes[len(out) :]]
            group.append(pieces[0])
            rest.insert(0, pieces[1])
            missing = 1
        out.append(product(*group))
    return out


def slices(term: Term, sizes: list[int], reason: str) -> list[Term]:
    """Cut a term into consecutive parts of the given sizes, which add up to its own; freeze it where it cannot be cut there."""
    parts: list[Term] = []
    rest = term
    for size in sizes:
        halves = cut(rest, size)
        if halves is None:
            freeze(term, f"{reason}: {_shape(resolve(term))} cannot be cut into sizes {tuple(sizes)}")
            return [*parts, *sizes[len(parts) :]]
        parts.append(halves[0])
        rest = halves[1]
    return parts


def _shape(term: Term) -> str:
    """Sizes of a term's parts, for messages: 2×(3+4)."""
    if isinstance(term, Product):
        return "×".join(_shape(f) if not isinstance(f, Sum) else f"({_shape(f)})" for f in term.factors)
    if isinstance(term, Sum):
        return "+".join(_shape(t) for t in term.terms)
    return str(size_of(term))

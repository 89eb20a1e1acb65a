"""Unification is sound: after it both sides describe the same elements, whatever is chosen for the axes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo_compress.structure import terms
from zoo_compress.structure import unify as u
from zoo_compress.structure.terms import concat, product
from zoo_compress.structure.unify import Variable


@st.composite
def sized_terms(draw, size, depth=2):
    """A term over fresh variables with the given number of elements."""
    if depth == 0 or size == 1:
        return draw(st.sampled_from([size, Variable(size)]))
    divisors = [n for n in range(2, size) if size % n == 0]
    kinds = ["variable", "number", "sum"] + (["product"] if divisors else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "product":
        outer = draw(st.sampled_from(divisors))
        return product(draw(sized_terms(outer, depth - 1)), draw(sized_terms(size // outer, depth - 1)))
    if kind == "sum":
        at = draw(st.integers(1, size - 1))
        return concat(draw(sized_terms(at, depth - 1)), draw(sized_terms(size - at, depth - 1)))
    return size if kind == "number" else Variable(size)


pairs = st.integers(2, 24).flatmap(lambda size: st.tuples(sized_terms(size), sized_terms(size)))


def rearranged(term, seed):
    """Index map of a term when every axis that may be permuted is, the same way for the same axis."""
    generator = np.random.default_rng(seed)
    pick = {v: generator.permutation(v.size) for v in sorted(set(u.variables(term)), key=lambda v: v.serial) if v.frozen is None}
    return pick


@given(pairs, st.integers(0, 100))
def test_unified_sides_move_together(pair, seed):
    a, b = pair
    u.unify(a, b, "test")
    joint = concat(u.resolve(a), u.resolve(b))
    pick = rearranged(joint, seed)
    index = [terms.index(u.resolve(side), u.SIZES, pick) for side in (a, b)]
    assert np.array_equal(*index)


@given(pairs)
def test_sizes_are_conserved(pair):
    sizes = [u.size_of(side) for side in pair]
    u.unify(*pair, "test")
    assert [u.size_of(u.resolve(side)) for side in pair] == sizes


@given(pairs, st.data())
def test_unified_sides_shrink_together(pair, data):
    a, b = pair
    u.unify(a, b, "test")
    free = {v for side in pair for v in u.variables(side) if v.frozen is None}
    pick = {v: data.draw(st.lists(st.integers(0, v.size - 1), min_size=1, unique=True)) for v in sorted(free, key=lambda v: v.serial)}
    assert np.array_equal(terms.index(u.resolve(a), u.SIZES, pick), terms.index(u.resolve(b), u.SIZES, pick))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 50))
def test_regrouped_dimensions_hold_the_same_elements(x, y, z, seed):
    """view of (x, y z) as (x y, z): the elements move as numpy moves them."""
    rows, columns = Variable(x), Variable(y * z)
    out = u.regroup([rows, columns], [x * y, z], "test")
    before, after = product(rows, columns), product(*out)
    pick = rearranged(u.resolve(before), seed)
    assert np.array_equal(terms.index(u.resolve(before), u.SIZES, pick), terms.index(u.resolve(after), u.SIZES, pick))


def test_qkv():
    """The textbook case: one projection of three times heads times width."""
    out = Variable(192)
    regrouped = u.regroup([2, 197, out], [2, 197, 3, 8, 8], "reshape")
    u.fix(regrouped[2], "unbind")
    shown = u.resolve(out)
    assert [u.size_of(f) for f in terms.factors(shown)] == [3, 8, 8]
    assert terms.factors(shown)[0] == 3
    assert all(v.frozen is None for v in u.variables(out))


def test_concatenation_against_product():
    q, k, v, whole = Variable(8), Variable(8), Variable(8), Variable(24)
    u.unify(whole, concat(q, k, v), "bias")
    u.regroup([whole], [3, 2, 4], "reshape")
    assert u.resolve(q) == u.resolve(k) == u.resolve(v)
    assert u.resolve(whole) == product(3, u.resolve(q))


def test_what_does_not_align_is_frozen_with_a_reason():
    a, b = product(Variable(4), Variable(3)), concat(Variable(5), Variable(7))
    u.unify(a, b, "blocks.0: add")
    assert all(v.frozen is not None and v.frozen.startswith("blocks.0: add") for side in (a, b) for v in u.variables(side))


def test_frozen_and_ordered_spread_over_bindings():
    a, b, c = Variable(6), Variable(6), Variable(6)
    u.freeze(a, "because")
    u.order(c)
    u.unify(a, b, "x")
    u.unify(b, c, "x")
    (only,) = u.variables(b)
    assert only.frozen == "because"
    assert only.ordered


def test_pieces_of_a_frozen_axis_are_frozen():
    axis = Variable(12)
    u.freeze(axis, "because")
    left, right = u.split(axis, 3)
    assert left.frozen == right.frozen == "because"


@pytest.mark.parametrize(("size", "at"), [(10, 3), (10, 0), (10, 10)])
def test_cut_gives_consecutive_parts(size, at):
    head, tail = u.cut(Variable(size), at)
    assert (u.size_of(head), u.size_of(tail)) == (at, size - at)

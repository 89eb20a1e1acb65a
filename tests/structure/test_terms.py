"""The notation: parsing, normal form, and index maps against numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo_compress import CompressError
from zoo_compress.structure import terms
from zoo_compress.structure.cost import Polynomial

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5}

atoms = st.one_of(st.integers(1, 4), st.sampled_from(sorted(SIZES)))
trees = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(st.just("product"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("sum"), st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)
picks = st.fixed_dictionaries(
    {name: st.permutations(range(size)).flatmap(lambda p: st.integers(1, len(p)).map(lambda n: p[:n])) for name, size in SIZES.items()}
)


def build(tree):
    if not isinstance(tree, tuple):
        return tree
    parts = [build(part) for part in tree[1]]
    return terms.product(*parts) if tree[0] == "product" else terms.concat(*parts)


def positions(tree, pick):
    """Positions kept, computed with numpy alone: a product is an outer array, a sum a concatenation."""
    if isinstance(tree, int):
        return tree, np.arange(tree)
    if isinstance(tree, str):
        return SIZES[tree], np.array(pick[tree])
    parts = [positions(part, pick) for part in tree[1]]
    sizes = [size for size, _ in parts]
    if tree[0] == "sum":
        whole = np.arange(sum(sizes))
        chunks = np.split(whole, np.cumsum(sizes)[:-1])
        return sum(sizes), np.concatenate([chunk[kept] for chunk, (_, kept) in zip(chunks, parts, strict=True)])
    whole = np.arange(int(np.prod(sizes))).reshape(sizes)
    return whole.size, whole[np.ix_(*(kept for _, kept in parts))].reshape(-1)


@given(trees, picks)
def test_index_map_is_numpys(tree, pick):
    size, kept = positions(tree, pick)
    term = build(tree)
    assert terms.size(term, SIZES) == size
    assert np.array_equal(terms.index(term, SIZES, pick), kept)


@given(trees)
def test_text_round_trip(tree):
    term = build(tree)
    assert terms.parse(str(term)) == term


@given(trees, st.fixed_dictionaries({name: st.integers(1, 9) for name in SIZES}))
def test_polynomial_is_the_size(tree, sizes):
    term = build(tree)
    assert Polynomial([(term, 3)], sorted(SIZES))(sizes) == 3 * terms.size(term, sizes)


@given(trees, st.sampled_from(sorted(SIZES)))
def test_labels_say_which_element_a_position_belongs_to(tree, axis):
    term = build(tree)
    found = terms.labels(term, SIZES, axis)
    assert len(found) == terms.size(term, SIZES)
    if list(terms.axes(term)).count(axis) != 1:
        return
    for element in range(SIZES[axis]):
        kept = terms.index(term, SIZES, {axis: [element]})
        elsewhere = terms.index(term, SIZES, {axis: []})
        assert set(np.flatnonzero(found == element)) == set(kept) - set(elsewhere)


def test_normal_form():
    assert str(terms.parse("(a + b) c")) == "a c + b c"
    assert terms.parse("2 3 a") == terms.parse("6 a")
    assert terms.parse("a + a + a") == terms.parse("3 a")
    assert terms.parse("1 a 1") == "a"


@pytest.mark.parametrize("text", ["", "a +", "+ a", "(a", "a)", "a * b", "a ++ b", "()", "é", "a.b"])
def test_text_that_is_no_term(text):
    with pytest.raises(CompressError, match="term"):
        terms.parse(text)


def test_nesting_is_bounded():
    with pytest.raises(CompressError, match="nested deeper"):
        terms.parse("(" * 5000 + "a" + ")" * 5000)


def test_only_strings_are_parsed():
    with pytest.raises(CompressError, match="expected a string"):
        terms.parse(64)

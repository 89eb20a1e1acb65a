"""Ranks from one budget: against trying everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo_compress.structure.ranks import Candidate, Choice, allocate, cheapest, evenly, total


def candidates(seed, layers=3, ranks=6):
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(layers):
        # Tails of descending squared singular values: convex, as losses of truncated decompositions are.
        values = np.sort(rng.exponential(size=ranks))[::-1]
        lost = values.sum() - values.cumsum()
        found[f"layer{i}"] = Candidate(dense=7.0, choices=(Choice("svd", np.arange(1, ranks + 1), lost + 0.1, 1.0),))
    return found


def loss(found, chosen):
    out = 0.0
    for name, choice in chosen.items():
        if choice is not None:
            kind, rank = choice
            picked = next(c for c in found[name].choices if c.kind == kind)
            out += picked.losses[list(picked.ranks).index(rank)]
    return out


def best_of_all(found, limit):
    options = [[None, *(("svd", int(rank)) for rank in c.choices[0].ranks)] for c in found.values()]
    fitting = [dict(zip(found, each, strict=True)) for each in itertools.product(*options)]
    return min(loss(found, each) for each in fitting if total(found, each) <= limit)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(3, 21))
def test_the_budget_holds_and_little_more_than_the_least_is_lost(seed, limit):
    found = candidates(seed)
    chosen = allocate(found, limit)
    assert total(found, chosen) <= limit
    # Lagrange relaxation misses only what lies between two prices: less than the dearest single step.
    steps = max(float(-np.diff(c.choices[0].losses).min(initial=0)) for c in found.values())
    assert loss(found, chosen) <= best_of_all(found, limit) + steps + max(float(c.choices[0].losses[-1]) for c in found.values())


@pytest.mark.parametrize("seed", range(5))
def test_what_a_price_buys_is_found_for_what_it_costs(seed):
    """What is best at some price on cost is the best of all that costs as much (Everett 1963)."""
    found = candidates(seed)
    options = [[None, *(("svd", int(rank)) for rank in c.choices[0].ranks)] for c in found.values()]
    every = [dict(zip(found, each, strict=True)) for each in itertools.product(*options)]
    for price in (0.01, 0.1, 0.3, 1.0):
        limit = total(found, min(every, key=lambda each: loss(found, each) + price * total(found, each)))
        assert loss(found, allocate(found, limit)) == pytest.approx(best_of_all(found, limit))


def test_nothing_is_factorised_when_all_fits():
    found = candidates(0)
    assert set(allocate(found, 21.0).values()) == {None}


def test_the_cheaper_of_two_kinds_is_taken():
    ranks = np.arange(1, 5)
    same = np.array([4.0, 2.0, 1.0, 0.5])
    found = {"a": Candidate(20.0, (Choice("spatial", ranks, same, 4.0), Choice("channel", ranks, same, 3.0)))}
    kind, _ = allocate(found, 12.5)["a"]
    assert kind == "channel"


def test_evenly_keeps_the_same_fraction_of_ranks():
    ranks = np.arange(1, 64)
    found = {name: Candidate(64.0 * cost, (Choice("svd", ranks, -ranks.astype(float), cost),)) for name, cost in (("a", 1.0), ("b", 10.0))}
    chosen = evenly(found, 0.5 * (64 + 640))
    assert chosen == {"a": ("svd", 32), "b": ("svd", 32)}
    assert cheapest(found) == 11.0

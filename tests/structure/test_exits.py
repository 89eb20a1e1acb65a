"""Records of exits, and thresholds for a budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from zoo_compress.errors import CompressError, VariantError
from zoo_compress.structure.exits import Exits, budgeted
from zoo_compress.structure.variant import Variant

PLACE = {"place": "layer1", "format": "NCHW", "features": 64}
VARIANT = {"version": 1, "method": "exits", "base": "resnet18", "sizes": {}, "params": {}}


def test_variant_carries_exits_and_is_silent_without():
    variant = Variant.from_dict({**VARIANT, "exits": {"places": [PLACE], "thresholds": [0.5]}})
    assert Variant.from_dict(variant.to_dict()) == variant
    assert variant.exits.places[0].pool == "mean"
    assert "exits" not in Variant.from_dict(VARIANT).to_dict()


@pytest.mark.parametrize(
    ("exits", "said"),
    [
        ({"places": []}, "places"),
        ({"places": [PLACE, PLACE]}, "at most once"),
        ({"places": [{**PLACE, "features": 10**12}]}, "features"),
        ({"places": [{**PLACE, "features": 0}]}, "features"),
        ({"places": [{**PLACE, "place": "../x"}]}, "place"),
        ({"places": [{**PLACE, "format": "HCWN"}]}, "format"),
        ({"places": [{**PLACE, "pool": "first"}]}, "class token"),
        ({"places": [{**PLACE, "leaf": -1}]}, "leaf"),
        ({"places": [{**PLACE, "grid": 17}]}, "grid"),
        ({"places": [{**PLACE, "format": "NLC", "grid": 2}]}, "expected 1 where there is no map"),
        ({"places": [PLACE], "thresholds": [0.5, 0.5]}, "thresholds"),
        ({"places": [PLACE], "thresholds": [1.5]}, "less than or equal to 1"),
        ({"places": [PLACE], "thresholds": [float("nan")]}, "thresholds"),
        ({"places": [PLACE], "confidence": "trust"}, "confidence"),
        ({"places": [PLACE], "truncated": True, "thresholds": [0.5]}, "truncated"),
        ({"places": [PLACE], "hook": "os.system"}, "hook"),
    ],
)
def test_variant_refuses_wrong_exits(exits, said):
    with pytest.raises(VariantError) as error:
        Variant.from_dict({**VARIANT, "exits": exits})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValidationError):
        Exits.model_validate(exits)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0, 1))
def test_thresholds_meet_the_budget_on_the_samples_they_were_found_on(seed, exits, where):
    generator = np.random.default_rng(seed)
    confidences = generator.random((400, exits))
    costs = np.cumsum(generator.random(exits + 1) + 0.1)
    budget = min(costs[0] + where * (costs[-1] - costs[0]), costs[-1])  # rounding may lead beyond
    found = budgeted(confidences, costs, budget)
    # Leave one after the other, as samples do.
    here, spent = np.ones(400, dtype=bool), 0.0
    for k, threshold in enumerate(found.thresholds):
        leaves = here & (confidences[:, k] >= threshold) if threshold is not None else np.zeros(400, dtype=bool)
        assert leaves.mean() == pytest.approx(found.fractions[k])
        spent += leaves.sum() * costs[k]
        here &= ~leaves
    spent += here.sum() * costs[-1]
    assert spent / 400 == pytest.approx(found.macs)
    # No two random numbers are equal: what is left is the rounding of counts of samples.
    assert abs(found.macs - budget) <= costs[-1] * exits / 400


def test_a_geometric_share_leaves_at_each_exit():
    found = budgeted(np.random.default_rng(0).random((100_000, 3)), [1.0, 2.0, 3.0, 4.0], 2.0)
    ratios = np.divide(found.fractions[1:], found.fractions[:-1])
    assert ratios == pytest.approx(np.full(3, ratios[0]), rel=2e-3)


def test_budget_out_of_reach_says_what_is_reachable():
    for budget in (0.5, 4.5):
        with pytest.raises(CompressError, match=r"no threshold reaches.*expected 1 .*to 4"):
            budgeted(np.ones((5, 1)), [1, 4], budget)


def test_equal_confidences_leave_together():
    found = budgeted(np.ones((10, 1)), [1.0, 2.0], 1.5)
    assert found.thresholds == (1.0,)
    assert found.fractions == (1.0, 0.0)
    assert found.macs == 1.0

"""Masks: the right number removed, the least important ones, removed stays removed, and none of another architecture."""

import pytest
import timm
import torch

from zoo_compress.errors import CompressError, VariantError
from zoo_compress.surgery.masks import (
    apply_,
    density,
    keep_best,
    masks_of,
    pack_masks,
    random_like,
    remaining,
    remove_fraction,
    unpack_masks,
)
from zoo_compress.surgery.packing import as_integers
from zoo_compress.surgery.patterns import check_pattern, keep_n_of_m, keep_units
from zoo_compress.surgery.weights import classifiers, ends, layer_weights


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(3)
    shapes = {"conv.weight": (12, 8, 3, 3), "fc.weight": (10, 16), "stem.weight": (12, 3, 5, 5)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def full(scores):
    return {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}


def test_global_masks_keep_the_highest_of_all(scores):
    masks = keep_best(scores, 0.25)
    assert remaining(masks) == round(0.25 * sum(s.numel() for s in scores.values()))
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    removed = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert kept.min() >= removed.max()


def test_local_masks_keep_the_same_of_each(scores):
    for name, mask in keep_best(scores, 0.25, "local").items():
        assert int(mask.sum()) == round(0.25 * mask.numel())
        assert scores[name][mask].min() >= scores[name][~mask].max()
    assert all(mask.sum() == 1 for mask in keep_best(scores, 1e-9, "local").values())


@pytest.mark.parametrize("scope", ["local", "global"])
def test_what_is_removed_is_not_kept_for_want_of_others(scores, scope):
    within = full(scores)
    within["conv.weight"].flatten()[100:] = False
    within["fc.weight"][:] = False
    masks = keep_best(scores, 0.9, scope, within)
    assert torch.equal(masks["conv.weight"], within["conv.weight"])
    assert not masks["fc.weight"].any()
    stem = masks["stem.weight"]
    assert int(stem.sum()) == (round(0.9 * stem.numel()) if scope == "local" else stem.numel())


def test_equal_scores_keep_the_first(scores):
    masks = keep_best({name: torch.zeros_like(score) for name, score in scores.items()}, 0.5, "local")
    for mask in masks.values():
        half = mask.numel() // 2
        assert mask.flatten()[:half].all()
        assert not mask.flatten()[half:].any()


def test_a_score_that_is_no_number_is_refused(scores):
    scores["fc.weight"][0, 0] = float("nan")
    with pytest.raises(CompressError, match="NaN"):
        keep_best(scores, 0.5)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_fraction_of_what_remains_is_removed_round_after_round(scores, scope):
    masks = full(scores)
    for _ in range(4):
        before, masks = masks, remove_fraction(masks, scores, 0.2, scope=scope)
        assert all((mask <= before[name]).all() for name, mask in masks.items()), "removed stays removed"
        assert abs(remaining(masks) - 0.8 * remaining(before)) <= len(masks)
    assert density(masks) == pytest.approx(0.8**4, abs=0.01)


def test_the_output_layer_has_a_fraction_of_its_own(scores):
    masks = remove_fraction(full(scores), scores, 0.2, other={"fc.weight": 0.1})
    assert int(masks["fc.weight"].sum()) == 160 - 16
    assert int(masks["conv.weight"].sum()) == 864 - round(0.2 * 864)
    for bad in (-0.1, 1.0, 2):
        with pytest.raises(CompressError, match="fraction: expected 0 up to 1"):
            remove_fraction(full(scores), scores, bad)


def test_random_masks_have_the_same_density_per_layer(scores):
    masks = keep_best(scores, 0.25)
    drawn = random_like(masks, 1)
    assert {name: int(mask.sum()) for name, mask in drawn.items()} == {name: int(mask.sum()) for name, mask in masks.items()}
    assert any((mask != masks[name]).any() for name, mask in drawn.items())
    assert all(torch.equal(mask, again) for mask, again in zip(drawn.values(), random_like(masks, 1).values(), strict=True))
    assert any((mask != other).any() for mask, other in zip(drawn.values(), random_like(masks, 2).values(), strict=True))


def test_a_model_carries_its_masks(model):
    net = timm.create_model("test_resnet", num_classes=10)
    weights = layer_weights(net)
    with torch.no_grad():
        next(iter(weights.values()))[0].zero_()  # kept, and zero as some layers begin
    masks = keep_best({name: torch.rand(w.shape) for name, w in weights.items()}, 0.3)
    apply_(net, masks)
    assert all(torch.equal(mask, masks_of(net)[name]) for name, mask in masks.items())
    for name, mask in masks.items():
        assert (as_integers(net.get_parameter(name))[~mask] == 0).all(), "+0.0 to the bit"


@pytest.mark.parametrize("pattern", ["kernel", "channel"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_units_are_kept_or_removed_whole(scores, pattern, scope):
    masks = keep_units(scores, 0.5, scope, pattern)
    dims = 1 if pattern == "channel" else 2
    for name, mask in masks.items():
        if mask.ndim > dims:
            units = mask.flatten(dims)
            assert torch.equal(units.all(-1), units.any(-1))
            mean = scores[name].flatten(dims).mean(-1)
            if scope == "local":
                assert mean[units.all(-1)].min() >= mean[~units.any(-1)].max()
    assert 0.4 < density(masks) <= 0.5
    smaller = keep_units(scores, 0.3, scope, pattern, within=masks)
    assert all((mask <= masks[name]).all() for name, mask in smaller.items())


def test_n_of_m(scores):
    masks = keep_n_of_m(scores, 2, 4)
    assert "stem.weight" not in masks, "3 inputs are no multiple of 4"
    for name, mask in masks.items():
        groups = mask.movedim(1, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all()
        values = scores[name].movedim(1, -1).reshape(-1, 4)
        assert (values.masked_fill(~groups, 2).min(1).values >= values.masked_fill(groups, -1).max(1).values).all()
    with pytest.raises(CompressError, match="multiple of 7, found none"):
        keep_n_of_m(scores, 2, 7)


@pytest.mark.parametrize("bad", ["4:2", "2:2", "0:4", "2:4:8", "rows", "", 3])
def test_patterns_that_are_none(bad):
    with pytest.raises(CompressError, match="pattern: expected kernel, channel or N:M"):
        check_pattern(bad)


def test_masks_of_another_architecture(model):
    other = masks_of(timm.create_model("test_resnet", num_classes=7))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        CompressError, match=r"mask 'fc.weight': expected bool \(10, 96\), found bool \(7, 96\): the masks are of another arch"
    ):
        apply_(model, other)
    with pytest.raises(CompressError, match=r"ResNet has no such parameter: the masks are of another architecture"):
        apply_(model, masks_of(timm.create_model("test_vit")))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_masks_are_stored_in_bits(scores):
    masks = keep_best(scores, 0.2)
    stored = pack_masks(masks)
    assert sum(t.nbytes for name, t in stored.items() if name.endswith(".mask")) == sum(-(-m.numel() // 8) for m in masks.values())
    again = unpack_masks(stored, "file")
    assert again.keys() == masks.keys()
    assert all(torch.equal(mask, masks[name]) for name, mask in again.items())
    for broken in (
        {**stored, "fc.weight.mask": stored["fc.weight.mask"][1:]},
        {**stored, "fc.weight.mask": stored["fc.weight.mask"].float()},
        {name: value for name, value in stored.items() if name != "fc.weight.shape"},
        {**stored, "other": torch.ones(1)},
    ):
        with pytest.raises(VariantError, match="file"):
            unpack_masks(broken, "file")


def test_which_weights(model):
    names = list(layer_weights(model))
    assert names == [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert classifiers(model) == ["fc.weight"]
    assert ends(model) == ["conv1.0.weight", "fc.weight"]
    assert not any(name.startswith("layer") for name in layer_weights(model, ["layer*"]))
    with pytest.raises(CompressError, match="'nothing' matches none"):
        layer_weights(model, ["nothing"])
    with pytest.raises(CompressError, match="found none"):
        layer_weights(model, ["*"])

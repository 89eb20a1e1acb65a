"""`<arch>__lowrank` and `<arch>__separable` in timm's factory: made by name, saved, created again, pruned before and after."""

import copy
import json

import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress.errors import CompressError, VariantError

SIZE = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10, **SIZE).eval()


@pytest.fixture(scope="module")
def lowrank(base):
    return zc.factorize(base, macs=0.7).eval()


@pytest.fixture(scope="module")
def separable(base):
    return zc.separate(base).eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 64)


def saved(model, path):
    zc.save(model, path)
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


@pytest.mark.parametrize("kind", ["lowrank", "separable"])
def test_round_trips_before_and_after_pruning(kind, request, image, tmp_path):
    model = request.getfixturevalue(kind)
    assert model.pretrained_cfg["architecture"] == f"test_resnet__{kind}"
    again = saved(model, tmp_path / "factorised")
    assert torch.equal(again(image), model(image))
    small = zc.prune(again, macs=0.6).eval()
    assert small.pretrained_cfg["architecture"] == "test_resnet__pruned"
    ranks = {path: dict(small.named_modules())[f"{path}.0"].weight.shape[0] for path in variant(small)["factors"]}
    assert any(ranks[path] < dict(model.named_modules())[f"{path}.0"].weight.shape[0] for path in ranks)
    reloaded = saved(small, tmp_path / "pruned")
    assert torch.equal(reloaded(image), small(image))
    zc.verify(reloaded, zc.analyze(reloaded))


def variant(model):
    return model._model_args["variant"]


@pytest.mark.parametrize("compress", [lambda m: zc.factorize(m, macs=0.7), zc.separate], ids=["lowrank", "separable"])
def test_pruned_then_factorised_then_pruned(base, compress, image, tmp_path):
    steps = [zc.prune(base, macs=0.5)]
    steps.append(compress(steps[0]))
    steps.append(zc.prune(steps[1], macs=0.6))
    for i, model in enumerate(steps):
        again = saved(model, tmp_path / str(i))
        assert torch.equal(again(image), model.eval()(image))
        steps[i] = again


def test_factorised_then_separated(lowrank, image, tmp_path):
    """A second method takes layers the first has left, and says so of those it has not."""
    plan = zc.plan_separate(lowrank)
    assert {"one of two layers already: prune their rank"} <= set(plan.left.values())
    both = zc.separate(lowrank).eval()
    assert {factor["kind"] for factor in variant(both)["factors"].values()} >= {"separable"}
    assert len(variant(both)["factors"]) == len(variant(lowrank)["factors"]) + len(plan.factors)
    assert torch.equal(saved(both, tmp_path)(image), both(image))


def test_exits_before_and_after(lowrank, base, image, tmp_path):
    for i, net in enumerate((zc.add_exits(lowrank, 2), zc.factorize(zc.add_exits(base, 2), macs=0.7))):
        net.eval()
        again = saved(net, tmp_path / str(i))
        for exit in range(3):
            assert torch.equal(again.infer(image, exit=exit), net.infer(image, exit=exit))
        small = zc.prune(again, macs=0.6).eval()
        reloaded = saved(small, tmp_path / f"{i}-pruned")
        assert torch.equal(reloaded.infer(image, exit=0), small.infer(image, exit=0))
        both = zc.add_exits(zc.prune(lowrank, macs=0.6), 2).eval()
        assert torch.equal(saved(both, tmp_path / f"{i}-both")(image), both(image))


def test_slimmable_widths_of_a_factorised_network(lowrank, image, tmp_path):
    net = zc.slim(copy.deepcopy(lowrank), widths=(0.5, 1.0)).eval()
    again = saved(net, tmp_path)
    for width in (0.5, 1.0):
        net.set_width(width)
        again.set_width(width)
        assert torch.equal(again(image), net(image))


def test_other_heads_inputs_and_features(lowrank, image, tmp_path):
    zc.save(lowrank, tmp_path)
    name = f"local-dir:{tmp_path}"
    assert timm.create_model(name, pretrained=True, num_classes=37)(image).shape == (2, 37)
    assert timm.create_model(name, pretrained=True, in_chans=1)(image[:, :1]).shape == (2, 10)
    again = timm.create_model(name, pretrained=True, num_classes=0).eval()
    assert torch.equal(again(image), lowrank.forward_head(lowrank.forward_features(image), pre_logits=True))
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    assert [f.shape[1] for f in features(image)] == features.feature_info.channels()
    lowrank_copy = timm.create_model(name, pretrained=True)
    lowrank_copy.reset_classifier(3)
    assert lowrank_copy(image).shape == (2, 3)


def test_made_by_name(image):
    model = timm.create_model("test_resnet__lowrank", macs=0.7, **SIZE)
    again = timm.create_model("test_resnet__lowrank", macs=0.7, **SIZE)
    assert variant(model)["factors"] == variant(again)["factors"]  # other random weights, the same structure
    assert timm.create_model("test_resnet__separable", num_classes=3, **SIZE)(image).shape == (2, 3)
    assert timm.create_model("test_resnet__lowrank", macs=0.7, features_only=True, **SIZE)(image)


def test_pretrained_factorises_the_bases_weights(base, image, tmp_path):
    zc.save(base, tmp_path)
    overlay = {"file": str(tmp_path / "model.safetensors"), "source": "file", "input_size": (3, 64, 64), "num_classes": 10}
    model = timm.create_model("test_resnet__lowrank", macs=0.7, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10).eval()
    assert torch.equal(model(image), zc.factorize(base, macs=0.7).eval()(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of macs=, params=, energy="),
        ({"keep": 0.5}, "found keep="),
        ({"macs": 0.5, "params": 0.5}, "exactly one of macs, params and energy, found macs and params"),
        ({"macs": 0.001}, "reachable"),
        ({"macs": -1}, "a fraction in \\(0, 1\\]"),
        ({"energy": 2.0}, "energy is a fraction"),
        ({"macs": 0.5, "scheme": "tucker"}, "expected one of auto, svd, spatial, channel, found 'tucker'"),
        ({"macs": 0.5, "scope": "here"}, "scope"),
        ({"macs": 0.5, "round_to": 0}, "round_to"),
        ({"macs": 0.5, "exclude": "nothing*"}, "matches no layer"),
        ({"macs": 1e12}, "more than the model has"),
    ],
)
def test_bad_options_end_in_one_clear_error(options, message):
    with pytest.raises(CompressError, match=message):
        timm.create_model("test_resnet__lowrank", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update({"layer9.conv": {"kind": "svd", "rank": 1}}), "has no such layer"),
        (lambda f: f.update({"bn1": {"kind": "svd", "rank": 1}}), "neither a linear layer nor"),
        (lambda f: next(iter(f.values())).update(rank=0), "rank: input should be greater than or equal to 1"),
        (lambda f: next(iter(f.values())).update(rank=10**6), "the full rank, found 1000000"),
        (lambda f: next(iter(f.values())).update(rank=2.5), "rank"),
        (lambda f: next(iter(f.values())).update(kind="tucker"), "kind"),
        (lambda f: next(iter(f.values())).update(more=1), "more"),
        (lambda f: f.update({"layer1.0.conv1.0": {"kind": "channel", "rank": 1}}), "no such layer"),
        (dict.clear, "has no such parameter"),
    ],
)
def test_damaged_records_are_refused(base, tmp_path, change, message):
    small = zc.factorize(zc.prune(base, macs=0.5), macs=0.7)
    zc.save(small, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config["model_args"]["variant"]["factors"])
    path.write_text(json.dumps(config))
    with pytest.raises(VariantError, match=message):
        zc.load(tmp_path)


def test_layers_with_removed_weights_stay(base, image, tmp_path):
    """A product of two has no zeros: what was removed would come back."""
    thin = zc.sparsify(base, density=0.5, exclude=["layer3*", "layer4*"])
    plan = zc.plan_factorize(thin, macs=0.9)
    assert plan.left["layer1.0.conv1"] == "its weight has removed or shared elements, which would be lost"
    both = zc.factorize(thin, macs=0.9).eval()
    assert torch.equal(both.layer1[0].conv1.weight, thin.layer1[0].conv1.weight)
    assert variant(both)["packed"]
    assert torch.equal(saved(both, tmp_path)(image), both(image))

"""`<arch>__exits` in timm's factory: made by name, saved, created again."""

import json

import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.sharing.card import plain
from zoo_compress.surgery.origin import variant_of

NAME = "test_resnet__exits"
SIZE = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return timm.create_model(NAME, exits=3, **SIZE).eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 64, 64)


def every(net, x):
    with net.every_output(), torch.no_grad():
        return net(x)


def saved(net, path):
    zc.save(net, path)
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("exits", [2, ("layer1", "layer3"), (0.3, 0.6), "layer2"])
def test_made_by_name(exits):
    net = timm.create_model(NAME, exits=exits, num_classes=5, **SIZE).train()
    assert [out.shape for out in net(torch.randn(2, 3, 64, 64))] == [(2, 5)] * (len(net.exits) + 1)
    assert net.pretrained_cfg["architecture"] == NAME


def test_round_trip_with_thresholds(net, images, tmp_path):
    net.calibrate([images], 0.6)
    again = saved(net, tmp_path / "net")
    assert same(every(again, images), every(net, images))
    assert again.record == net.record
    assert torch.equal(again.infer(images), net.infer(images))


def test_pretrained_loads_the_bases_weights_into_the_trunk(images, tmp_path):
    base = timm.create_model("test_resnet").eval()
    zc.save(base, tmp_path)
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "model.safetensors"), "source": "file", "input_size": (3, 64, 64)}}
    net = timm.create_model(NAME, exits=2, pretrained=True, **overlay).eval()
    assert torch.equal(net(images), base(images))


def test_pruned_and_then_exits_and_the_other_way_round(net, images, tmp_path):
    small = zc.prune(net, macs=0.5)
    again = saved(small, tmp_path / "small")
    assert again.pretrained_cfg["architecture"] == "test_resnet__pruned"
    assert same(every(again, images), every(small, images))

    pruned = timm.create_model("test_resnet__pruned", keep=0.5, **SIZE)
    with_exits = zc.add_exits(pruned, 2).eval()
    again = saved(with_exits, tmp_path / "with_exits")
    assert again.pretrained_cfg["architecture"] == NAME
    assert torch.equal(again(images), pruned.eval()(images))
    assert same(every(again, images), every(with_exits, images))
    smaller = zc.prune(with_exits, macs=0.6)
    assert same(every(saved(smaller, tmp_path / "smaller"), images), every(smaller, images))


def test_exported_round_trip(net, images, tmp_path):
    for subject in (net, zc.prune(net, macs=0.5)):
        for exit in (0, 2):
            short = subject.export(exit)
            again = saved(short, tmp_path / f"{id(subject)}-{exit}")
            assert torch.equal(again(images), short(images))
            assert again.state_dict().keys() == short.state_dict().keys()
            pruned = zc.prune(short, macs=0.6)
            assert torch.equal(saved(pruned, tmp_path / f"{id(subject)}-{exit}-pruned")(images), pruned(images))


def test_what_timm_users_expect(net, images, tmp_path):
    zc.save(net, tmp_path)
    name = f"local-dir:{tmp_path}"
    other = timm.create_model(name, pretrained=True, num_classes=7).eval()
    assert [out.shape[1] for out in every(other, images)] == [7] * 4
    assert torch.equal(other.forward_features(images), net.forward_features(images))
    gray = timm.create_model(name, pretrained=True, in_chans=1).eval()
    assert gray(images[:, :1]).shape == (4, 1000)
    backbone = timm.create_model(name, pretrained=True, features_only=True).eval()
    plain = timm.create_model("test_resnet", features_only=True)
    assert [f.shape[1] for f in backbone(images)] == plain.feature_info.channels()
    assert not any(key.startswith("exits") for key in backbone.state_dict())
    features = timm.create_model(name, pretrained=True, num_classes=0).eval()
    assert features(images).shape == (4, features.num_features)


@pytest.mark.parametrize(
    ("exits", "said"),
    [
        (None, "expected one of exits=, variant="),
        (0, "expected 1 to 256"),
        (True, "found True"),
        ((), r"found \(\)"),
        ((0.6, 0.3), "ascending"),
        ((0.5, 1.5), "between 0 and 1"),
        ((0.5, "layer1"), "expected a number of exits"),
        (("layer1", "layer1"), "each module once"),
        (("layr1",), "did you mean layer1"),
        (("fc",), "nothing is computed after 'fc'"),
        (60, "expected at most"),
    ],
)
def test_bad_exits(exits, said):
    with pytest.raises(CompressError, match=said):
        timm.create_model(NAME, exits=exits, **SIZE)


def test_other_bad_arguments(net):
    with pytest.raises(CompressError, match="expected exits=, grid=, found keep="):
        timm.create_model(NAME, exits=2, keep=0.5)
    for grid in (0, 17, 2.0, True):
        with pytest.raises(CompressError, match=f"grid: expected 1 to 16 parts of each side of a map, found {grid}"):
            timm.create_model(NAME, exits=2, grid=grid, **SIZE)
    with pytest.raises(CompressError, match="has exits already"):
        zc.add_exits(net, 2)
    with pytest.raises(CompressError, match="made by timm"):
        zc.add_exits(torch.nn.Linear(2, 2), 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda exits: exits["places"][0].update(features=2**23), "expected 8388608 features"),
        (lambda exits: exits["places"][0].update(place="layer9"), "no module 'layer9'"),
        (lambda exits: exits["places"][0].update(place="layer4"), "does not run after"),
        (lambda exits: exits["places"][0].update(format="NHWC"), "in format NHWC"),
        (lambda exits: exits["places"][0].update(leaf=3), "features"),
        (lambda exits: exits["places"][0].update(grid=16), r"exits\.0\.fc\.weight"),
        (lambda exits: exits.update(thresholds=[2, 2, 2]), "thresholds"),
        (lambda exits: exits["places"].pop(), "tensor 'exits.2"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(net, tmp_path, change, said):
    zc.save(net, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    exits = config["model_args"]["variant"]["exits"]
    exits["thresholds"] = None
    change(exits)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match=said) as error:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "\n" not in str(error.value)


def test_a_network_that_ends_at_an_exit_gives_no_features(tmp_path):
    short = zc.add_exits(timm.create_model("test_resnet", num_classes=10), 2).export(0)
    zc.save(short, tmp_path)
    with pytest.raises(zc.VariantError, match="ends at an early exit: expected no features_only=True"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)
    assert "features_only" not in plain(short, tmp_path, "me/short")


def test_a_pruned_model_whose_base_needs_its_pooling_and_image_size_gets_exits(tmp_path):
    """The base is made once more to learn how wide its heads would be; without a class token it refuses the pooling it has by default."""
    without = {"class_token": False, "global_pool": "avg", "img_size": 32, "in_chans": 1, "num_classes": 5}
    net = zc.add_exits(zc.prune(timm.create_model("test_vit", **without), macs=0.5), 2).eval()
    x = torch.randn(2, 1, 32, 32)
    assert same(every(saved(net, tmp_path), x), every(net, x))


def test_an_exit_may_lie_between_the_two_layers_of_a_pair(images, tmp_path):
    small = zc.prune(zc.factorize(timm.create_model("test_resnet", **SIZE), macs=0.6), macs=0.7)
    pair = next(iter(variant_of(small).factors))
    net = zc.add_exits(small, (f"{pair}.0", "layer3")).eval()
    assert same(every(saved(net, tmp_path), images), every(net, images))

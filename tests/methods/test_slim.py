"""One bank, many widths: as good as the static models it exports, and as their training together."""

import copy
import json

import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch import nn

import zoo_compress as zc
from zoo_compress.methods.slim import SlimTask


def made(name="test_resnet", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f"{name}__slim", num_classes=5, **kwargs).eval()


def batch(net, size=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, *net.default_cfg["input_size"], generator=generator), torch.arange(size) % 5


def test_widths_are_fractions_rounded_as_pruning_rounds():
    net = made()
    assert net.widths == (0.25, 0.5, 0.75, 1.0)
    assert net.sizes == net.layout.base_sizes
    pruned = timm.create_model("test_resnet__pruned", keep=0.5, num_classes=5)
    net.set_width(0.5)
    assert {name: tuple(p.shape) for name, p in net.export().named_parameters()} == {
        name: tuple(p.shape) for name, p in pruned.named_parameters()
    }


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_exported_widths_are_proven_equal_and_saved(name, tmp_path):
    net = made(name, widths=(0.3, 0.7, 1.0))
    images, _ = batch(net)
    net.train()
    for width in net.widths:
        net.set_width(width)
        net(images)  # gives each its own statistics
    net.eval()
    for width in net.widths:
        small = net.export(width)
        zc.verify(small, zc.analyze(small))
        net.set_width(width)
        zc.save(small, tmp_path / str(width))
        again = timm.create_model(f"local-dir:{tmp_path / str(width)}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(net(images), small(images))
            assert torch.equal(again(images), small(images))
        assert sum(p.numel() for p in small.parameters()) == net.layout.num_params(net.sizes)


@pytest.mark.parametrize("universal", [False, True])
def test_all_widths_are_in_one_file(universal, tmp_path):
    net = made(universal=universal, widths=(0.25, 0.5, 1.0))
    images, _ = batch(net)
    net.train()
    for width in net.widths:
        net.set_width(width)
        net(images)
        if universal:
            zc.calibrate(net, width, [images])
    zc.calibrate(net, {"c0": net.layout.axes["c0"].size // 2}, [images])
    net.eval()
    zc.save(net, tmp_path / "net")
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]
    again = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    assert (again.widths, again.universal, again.choices) == (net.widths, net.universal, net.choices)
    assert again.layout.macs_terms == net.layout.macs_terms
    assert again.layout.params == net.layout.params
    for width in (*net.widths, {"c0": net.layout.axes["c0"].size // 2}):
        for network in (net, again):
            network.set_widths(network.sizes_at(width)[0])
        with torch.no_grad():
            assert torch.equal(net(images), again(images))
    other = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True, num_classes=9)
    assert other(images).shape == (4, 9)
    assert other.layout.macs() == zc.analyze(other.export()).macs()


def many_links(bank):
    """Within the bounds of each list; together they would be worked out for minutes."""
    whole = bank["choices"][-1]["sizes"]
    bank["choices"] = [{"sizes": {**whole, "c0": size}} for size in range(1, 9)]
    bank["links"] = [[str(i), str(i)] for i in range(1, 60_001)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda bank: bank.update(widths=[1.0, 0.5]), "widths that ascend"),
        (lambda bank: bank.update(widths=[0.5, 1.5]), "bank.widths.1"),
        (lambda bank: bank["choices"][0]["sizes"].update(c0=10**12), "bank.choices.0.sizes.c0"),
        (lambda bank: bank["choices"][0]["sizes"].update(c0=10**6), "expected at most"),
        (lambda bank: bank["choices"][0]["sizes"].pop("c0"), "expected the axes of the bank, found a difference at 'c0'"),
        (lambda bank: bank["macs_terms"].append(["nowhere 3", 1]), "axis 'nowhere' has no entry in sizes"),
        (lambda bank: bank["choices"].append(bank["choices"][0]), "each choice of sizes once"),
        (many_links, "bank.links: expected at most 32768 for so many choices, found 60000"),
        (lambda bank: bank.update(round_to=0), "bank.round_to"),
    ],
)
def test_hostile_records(change, said, tmp_path):
    net = made(widths=(0.5, 1.0))
    zc.save(net, tmp_path / "net")
    path = tmp_path / "net" / "config.json"
    config = json.loads(path.read_text())
    change(config["model_args"]["variant"]["bank"])
    path.write_text(json.dumps(config))
    with pytest.raises(zc.CompressError, match=said):
        zc.load(tmp_path / "net")


def test_a_step_is_the_sum_of_steps_of_all_widths():
    net = made(widths=(0.5, 1.0))
    images, target = batch(net)
    statics = {width: net.export(width).train() for width in net.widths}
    net.train()
    result = SlimTask(ClassificationTask(net, verbose=False))(images, target)
    result["loss"].backward()
    losses = {width: nn.functional.cross_entropy(small(images), target) for width, small in statics.items()}
    assert torch.allclose(result["loss"], sum(losses.values()))
    sum(losses.values()).backward()
    narrow, wide = dict(statics[0.5].named_parameters()), dict(statics[1.0].named_parameters())

    name = next(name for name, p in narrow.items() if p.ndim == 4 and p.shape != wide[name].shape)
    expected = wide[name].grad.clone()
    expected[tuple(slice(n) for n in narrow[name].shape)] += narrow[name].grad
    assert torch.allclose(net.get_parameter(name).grad, expected, atol=1e-6)
    norm = next(name for name, p in narrow.items() if p.ndim == 1 and p.shape != wide[name].shape)
    assert torch.allclose(net.get_parameter(norm).grad, wide[norm].grad, atol=1e-6)  # the whole's own
    assert torch.allclose(net.get_parameter(f"private.0.{norm.replace('.', '/')}").grad, narrow[norm].grad, atol=1e-6)
    assert all(p.grad is not None for p in net.parameters())
    assert net.sizes == net.layout.base_sizes


def test_statistics_are_those_each_width_has_alone():
    net = made(widths=(0.5, 1.0))
    images, target = batch(net)
    statics = {width: net.export(width).train() for width in net.widths}
    SlimTask(ClassificationTask(net, verbose=False)).train()(images, target)
    for width, small in statics.items():
        small(images)
        exported = net.export(width)
        assert all(torch.equal(a, b) for a, b in zip(exported.buffers(), small.buffers(), strict=True))


def test_a_pruned_model_can_be_slimmed():
    small = timm.create_model("test_resnet__pruned", keep=0.5, num_classes=5).eval()
    images, _ = batch(small)
    with torch.no_grad():
        expected = small(images)
        net = zc.slim(copy.deepcopy(small), (0.5, 1.0)).eval()
        assert torch.equal(net(images), expected)
    assert net.pretrained_cfg["architecture"] == "test_resnet__slim"
    exported = net.export(0.5)
    assert exported.pretrained_cfg["architecture"] == "test_resnet__pruned"
    zc.verify(exported, zc.analyze(exported))


def test_pretrained_weights_become_the_bank(tmp_path):
    base = timm.create_model("test_resnet", num_classes=5).eval()
    zc.save(base, tmp_path / "base")
    overlay = {"file": str(tmp_path / "base" / "model.safetensors"), "num_classes": 5}
    net = timm.create_model("test_resnet__slim", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay).eval()
    images, _ = batch(net)
    with torch.no_grad():
        assert torch.equal(net(images), base(images))


def test_every_width_a_universal_network_runs_at():
    net = made(universal=True, widths=(0.25, 1.0)).train()
    images, _ = batch(net)
    for width in (0.25, 0.3, 0.77, 1.0):
        net.set_width(width)
        assert net(images).shape == (4, 5)
    with pytest.raises(zc.CompressError, match="no statistics"):
        net.export(0.77)
    zc.calibrate(net, 0.77, [images])
    zc.verify(net.export(0.77), zc.analyze(net.export(0.77)))
    assert net.sizes == net.layout.base_sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (0.5, 1.5)}, r"widths in \(0, 1\], found 1.5"),
        ({"widths": (0.0, 1.0)}, r"widths in \(0, 1\], found 0.0"),
        ({"widths": (0.5, "x")}, "found 'x'"),
        ({"widths": ()}, "a list of widths"),
        ({"widths": 0.5}, "a list of widths"),
        ({"widths": (0.5, 0.5)}, "different widths"),
        ({"widths": (0.5, 0.501, 1.0)}, "0.5 and 0.501 come to the same sizes"),
        ({"round_to": 0}, "round_to is a positive integer"),
        ({"keep": 0.5}, "expected widths=, universal=, round_to=, exits=, found keep="),
        ({"features_only": True}, "export a width"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(zc.CompressError, match=message):
        timm.create_model("test_resnet__slim", **arguments)


@pytest.mark.parametrize("width", [0.3, 0, 1.2, "half", True, float("nan")])
def test_a_width_it_does_not_have(width):
    net = made()
    with pytest.raises(zc.WidthError, match="width: expected"):
        net.set_width(width)
    with pytest.raises(zc.WidthError, match="width: expected"):
        net.export(width)
    assert net.sizes == net.layout.base_sizes


def test_a_model_that_cannot_change():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    layout = zc.analyze(model, torch.randn(2, 3, 4, 4))
    with pytest.raises(zc.CompressError, match="no axis of Sequential may change"):
        zc.slim(model, layout=layout)


def test_a_task_needs_a_slimmable_model():
    with pytest.raises(zc.CompressError, match="expected a task whose model is Slimmable, found ResNet"):
        SlimTask(ClassificationTask(timm.create_model("test_resnet"), verbose=False))

"""Layers and blocks may be called by keyword, by whatever names their forward functions have."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.methods.groups import GroupsConfig
from zoo_compress.surgery.moments import gather

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Conv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(input=x, weight=self.weight, bias=self.bias, stride=self.stride, padding=self.padding)


class Norm(nn.BatchNorm2d):
    def forward(self, features):
        if self.training:
            return super().forward(features)
        return F.batch_norm(
            input=features, running_mean=self.running_mean, running_var=self.running_var, weight=self.weight, bias=self.bias
        )


class Head(nn.Linear):
    def forward(self, tokens):
        return F.linear(input=tokens, weight=self.weight, bias=self.bias)


class Block(nn.Module):
    def __init__(self, keyword):
        super().__init__()
        self.keyword = keyword
        self.conv1, self.norm1 = Conv(16, 16, 3, padding=1, bias=False), Norm(16)
        self.conv2, self.norm2 = Conv(16, 16, 3, padding=1, bias=False), Norm(16)

    def forward(self, image):
        if self.keyword:
            branch = self.norm2(features=self.conv2(x=self.norm1(features=self.conv1(x=image)).relu()))
        else:
            branch = self.norm2(self.conv2(self.norm1(self.conv1(image)).relu()))
        return image + branch


class Net(nn.Module):
    def __init__(self, keyword):
        super().__init__()
        self.keyword, self.stem, self.block, self.head = keyword, Conv(3, 16, 3, padding=1), Block(keyword), Head(16, 10)

    def forward(self, x):
        if self.keyword:
            return self.head(tokens=self.block(image=self.stem(x=x)).relu().mean((2, 3)))
        return self.head(self.block(self.stem(x)).relu().mean((2, 3)))


def pair():
    """The same network, once called by position and once by keyword."""
    torch.manual_seed(0)
    plain = Net(False).eval()
    named = Net(True).eval()
    named.load_state_dict(plain.state_dict())
    return plain, named


def test_moments_of_inputs_are_the_same():
    plain, named = pair()
    layout = zc.analyze(plain, IMAGES)
    assert str(zc.analyze(named, IMAGES)) == str(layout)
    expected, found = gather(plain, layout, [IMAGES], sensitivity=True), gather(named, layout, [IMAGES], sensitivity=True)
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        assert torch.equal(found[name].sums, moments.sums)
        assert torch.equal(found[name].sensitivity, moments.sensitivity)
        assert (found[name].bias, found[name].norm) == (moments.bias, moments.norm)
    assert found["block.conv1.weight"].norm == "block.norm1.running_mean"


@pytest.mark.parametrize("criterion", ["l2", "thinet"])
def test_pruning_with_reconstruction_gives_the_same(criterion):
    plain, named = pair()
    small = [
        zc.prune(m, macs=0.6, round_to=1, criterion=criterion, reconstruct=[IMAGES], layout=zc.analyze(m, IMAGES)) for m in (plain, named)
    ]
    with torch.no_grad():
        torch.testing.assert_close(small[1].eval()(IMAGES), small[0].eval()(IMAGES), rtol=0, atol=0)


def test_residual_blocks_are_found_in_both():
    (plain, refused), (named, refused_too) = (zc.residual_blocks(model, IMAGES) for model in pair())
    assert plain.keys() == named.keys() == {"block"}
    assert refused == refused_too


class Grouped(nn.Module):
    def __init__(self, keyword):
        super().__init__()
        self.keyword, self.stem, self.head = keyword, nn.Conv2d(3, 16, 3), nn.Linear(16, 10)
        self.conv, self.point = nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.point(input=self.conv(input=x)) if self.keyword else self.point(self.conv(x))
        return self.head(x.relu().mean((2, 3)))


def test_groups_are_scaled_in_both(monkeypatch):
    monkeypatch.setattr("zoo_compress.methods.groups.analyze", lambda model: zc.analyze(model, IMAGES))
    monkeypatch.setattr("zoo_compress.surgery.layers.default_input", lambda model: IMAGES)
    torch.manual_seed(0)
    plain, named = Grouped(False).eval(), Grouped(True).eval()
    named.load_state_dict(plain.state_dict())
    config, outputs = GroupsConfig(), []
    for model in (plain, named):
        factors = torch.linspace(0.2, 1.0, config.count(model))
        handles = config.attach(model, lambda module, factors=factors: factors)
        with torch.no_grad():
            outputs.append(model(IMAGES))
        [handle.remove() for handle in handles]
        with torch.no_grad():
            assert not torch.equal(model(IMAGES), outputs[-1])
    assert torch.equal(*outputs)


def test_a_layer_of_a_timm_model_called_by_keyword_is_reconstructed():
    model = timm.create_model("test_resnet", num_classes=10).eval()
    old = model.layer1[0].conv1
    model.layer1[0].conv1 = Conv(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
    model.layer1[0].conv1.load_state_dict(old.state_dict())
    reference = timm.create_model("test_resnet", num_classes=10).eval()
    reference.load_state_dict(model.state_dict())
    small, expected = (zc.prune(m, macs=0.6, reconstruct=[IMAGES]) for m in (model, reference))
    with torch.no_grad():
        assert torch.equal(small.eval()(IMAGES), expected.eval()(IMAGES))

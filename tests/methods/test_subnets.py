"""The search finds sub-networks that meet the budget, and says of each what it is."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

import zoo_compress as zc


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return timm.create_model("test_resnet__slim", num_classes=5, universal=True, widths=(0.25, 1.0)).eval()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 64, 64, generator=generator), torch.arange(8) % 5) for _ in range(2)]


@pytest.mark.parametrize("how", ["evolution", "greedy"])
def test_the_best_is_what_it_is_said_to_be(net, data, how, tmp_path):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = zc.search(net, macs=0.5, data=data, how=how, evaluations=40)
    assert len(result.judged) <= 40
    assert result.best.macs <= 0.5 * net.layout.macs()
    assert result.best.loss == min(c.loss for c in result.judged if c.macs <= 0.5 * net.layout.macs())
    small = net.export(result.best.sizes).eval()
    zc.verify(small, zc.analyze(small))
    assert zc.analyze(small).macs() == result.best.macs
    with torch.no_grad():
        logits = torch.cat([small(images) for images, _ in data])
    target = torch.cat([target for _, target in data])
    assert result.best.loss == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-5)
    assert result.best.top1 == pytest.approx(100 * float((logits.argmax(-1) == target).float().mean()))
    assert net.sizes == net.layout.base_sizes
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    macs, losses = [c.macs for c in result.front], [c.loss for c in result.front]
    assert macs == sorted(macs)
    assert losses == sorted(losses, reverse=True)
    for c in result.judged:
        assert any(f.macs <= c.macs and f.loss <= c.loss for f in result.front)
    assert str(result).count("\n") == len(result.front)
    result.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_every_module_keeps_its_mode(net, data):
    net = copy.deepcopy(net).train()
    net.layer1.eval()
    modes = {path: module.training for path, module in net.named_modules()}
    zc.search(net, macs=0.6, data=data, evaluations=2)
    assert {path: module.training for path, module in net.named_modules() if path in modes} == modes


def test_the_same_seed_finds_the_same(net, data):
    first, second = (zc.search(net, macs=0.4, data=data, evaluations=12, seed=3) for _ in range(2))
    assert first == second


def test_evolution_beats_the_uniform_width_it_starts_from(net, data):
    result = zc.search(net, macs=0.5, data=data, evaluations=40)
    assert result.best.loss <= result.judged[0].loss


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"macs": 0}, zc.CompressError, r"macs is a fraction in \(0, 1\] or a count"),
        ({"macs": 10**12}, zc.CompressError, "found 1000000000000"),
        ({"macs": 0.01}, zc.WidthError, "no sub-network has 0.01 of the MACs: the least has"),
        ({"macs": 0.5, "how": "magic"}, zc.CompressError, "one of evolution, greedy, found 'magic'"),
        ({"macs": 0.5, "evaluations": 1}, zc.CompressError, "at least 2 evaluations"),
        ({"macs": 0.5, "data": []}, zc.CompressError, "found none"),
        ({"macs": 0.5, "data": [torch.zeros(2, 3, 64, 64)]}, zc.CompressError, "class indices.*found Tensor"),
        ({"macs": 0.5, "data": [(torch.zeros(2, 5, 64, 64), torch.zeros(2).long())]}, zc.CompressError, "that SlimmableResNet takes"),
    ],
)
def test_bad_input(net, data, arguments, error, message):
    with pytest.raises(error, match=message):
        zc.search(net, **{"data": data, **arguments})
    assert net.sizes == net.layout.base_sizes


def test_other_models(data):
    with pytest.raises(zc.CompressError, match="expected a slimmable network, found ResNet"):
        zc.search(timm.create_model("test_resnet"), macs=0.5, data=data)

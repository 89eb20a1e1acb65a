"""Elimination removes what least squares can best do without, and the damage of whole groups is measured."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.methods import damage
from zoo_compress.methods.criteria import scores
from zoo_compress.methods.damage import damage_scores, eliminate
from zoo_compress.structure.widths import groups
from zoo_compress.surgery import reconstruct as reconstruct_module
from zoo_compress.surgery.divergence import divergence, outputs
from zoo_compress.surgery.images import parted
from zoo_compress.surgery.moments import gather


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 4, 3)
        self.right = nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(4, 5)
        self.num_classes = 5

    def forward(self, x):
        x = self.first(x).relu()
        return self.head((self.left(x) + self.right(x)).relu().mean((2, 3)))


@pytest.fixture
def case():
    model = Net().eval()
    layout = zc.analyze(model, torch.randn(2, 3, 9, 9))
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(16, 3, 9, 9, generator=generator) for _ in range(4)]
    return model, layout, images, layout.params["first.weight"][0]


def test_useless_and_doubled_channels_go_first(case, monkeypatch):
    monkeypatch.setattr(reconstruct_module, "RIDGE", 1e-6)
    model, layout, images, axis = case
    with torch.no_grad():
        for layer in (model.left, model.right):
            layer.weight[:, 3] = 0
        model.first.weight[6], model.first.bias[6] = model.first.weight[1], model.first.bias[1]
    removal = eliminate(model, layout, axis, gather(model, layout, images, sensitivity=True))
    assert removal.order[0] == 3
    assert removal.order[1] in (1, 6)
    assert {1, 6} - {removal.order[1]} <= set(removal.order[2:])
    assert sorted(removal.order) == list(range(8))
    assert removal.curve[1] < 1e-2 * removal.curve[2]


def test_predicted_damage_is_that_of_least_squares_from_scratch(case, monkeypatch):
    """The error of each removal, by updates, against the weighted error of a new least squares solution on what is left."""
    monkeypatch.setattr(reconstruct_module, "RIDGE", 1e-6)
    model, layout, images, axis = case
    moments = gather(model, layout, images, sensitivity=True)
    removal = eliminate(model, layout, axis, moments)
    for removed in (1, 3, 6):
        keep = np.sort(removal.order[removed:])
        total = 0.0
        for name in ("left.weight", "right.weight"):
            covariance, _, _ = moments[name].covariance()
            weight = dict(model.named_parameters())[name].detach().double().flatten(1).numpy()
            columns = (keep[:, None] * 9 + np.arange(9)).flatten()
            c = covariance[0].numpy()
            solution = np.linalg.solve(c[np.ix_(columns, columns)], c[columns] @ weight.T).T
            rest = weight.copy()
            rest[:, columns] -= solution
            total += 0.5 * float(((rest @ c * rest).sum(1) * moments[name].sensitivity.numpy()).sum())
        assert removal.curve[:removed].sum() == pytest.approx(total, rel=1e-2)


def test_many_elements_go_several_at_a_time(monkeypatch, case):
    model, layout, images, axis = case
    moments = gather(model, layout, images, sensitivity=True)
    one_by_one = eliminate(model, layout, axis, moments)
    monkeypatch.setattr(damage, "SHARE", 3)
    assert sorted(eliminate(model, layout, axis, moments).order) == sorted(one_by_one.order)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(3, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = x.flatten(2).mT
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return self.head((weights @ self.value(x)).mean(1))


def test_an_axis_that_no_layer_reads_is_ordered_by_its_scores():
    """Queries and keys meet in a product of activations."""
    model = Attention().eval()
    images = [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))]
    layout = zc.analyze(model, images[0])
    moments = gather(model, layout, images, sensitivity=True)
    axis = layout.params["query.weight"][0]
    assert axis == layout.params["key.weight"][0]
    assert eliminate(model, layout, axis, moments) is None
    plain = scores(model, layout, layout.free, damage.UNREAD)
    found = damage_scores(model, layout, groups(layout), moments, images, plain, "macs")
    assert (np.argsort(found[axis]) == np.argsort(plain[axis])).all()


def test_worth_rises_along_the_order_of_removal(case):
    model, layout, images, axis = case
    moments = gather(model, layout, images, sensitivity=True)
    chosen = groups(layout)
    plain = scores(model, layout, [name for group in chosen for name in group.axes], damage.UNREAD)
    for kind in ("macs", "params", "keep"):
        found = damage_scores(model, layout, chosen, moments, images, plain, kind)
        order = eliminate(model, layout, axis, moments).order
        assert (np.diff(found[axis][order]) > 0).all()


def settled(name, images):
    """A model without what only untrained ones have: blocks that add nothing, statistics of no data, outputs near zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.uniform_(0.5, 1.0)
    zc.calibrate(model, images)
    with torch.no_grad():
        head = model.get_classifier()
        head.weight.mul_(2 / outputs(model, images)[0].std())
    return model


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("criterion", ["l2", "thinet"])
def test_reconstruction_brings_predictions_closer(name, criterion):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 64, 64) if name != "test_vit" else (3, 160, 160)
    images = [torch.randn(16, *shape, generator=generator) for _ in range(2)]
    fresh = [torch.randn(16, *shape, generator=generator)]
    model = settled(name, images)
    expected = outputs(model, fresh)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = zc.prune(model, macs=0.7, criterion=criterion, data=images)
    small = zc.prune(model, macs=0.7, criterion=criterion, reconstruct=images)
    assert divergence(outputs(small, fresh), expected, logits=True) < 0.5 * divergence(outputs(plain, fresh), expected, logits=True)
    assert zc.analyze(small).macs() == pytest.approx(0.7 * zc.analyze(model).macs(), rel=0.03)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("global_pool", ["avg", ""])
def test_outputs_that_a_backbone_no_longer_gives_count_as_lost(global_pool):
    model = timm.create_model("test_resnet", num_classes=0, global_pool=global_pool).eval()
    images = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    layout = zc.analyze(model)
    axis = layout.outputs[0][1]
    kept = np.arange(0, layout.axes[axis].size, 2)
    small = zc.resize(model, layout, {axis: kept})
    (whole,), (given,), (filled,) = outputs(model, images), outputs(small, images), outputs(small, images, layout, {axis: kept})
    assert filled.shape == whole.shape
    assert torch.equal(filled[:, kept], given)
    assert not filled[:, 1::2].any()
    pruned = zc.prune(model, macs=0.7, criterion="thinet", reconstruct=images)
    assert zc.analyze(pruned).macs() == pytest.approx(0.7 * layout.macs(), rel=0.03)


def test_the_same_twice():
    model = timm.create_model("test_resnet", num_classes=10).eval()
    images = [torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))]
    first, second = (zc.prune(model, macs=0.6, criterion="thinet", reconstruct=images, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_everything_kept_is_the_same_model():
    model = timm.create_model("test_efficientnet", num_classes=10).eval()
    images = [torch.randn(4, *model.default_cfg["input_size"])]
    same = zc.prune(model, macs=1.0, criterion="thinet", reconstruct=images)
    assert torch.equal(same(images[0]), model(images[0]))


def test_images_are_asked_for():
    model = timm.create_model("test_resnet", num_classes=10).eval()
    with pytest.raises(zc.CompressError, match=r"thinet.*pass reconstruct= or data="):
        zc.prune(model, macs=0.6, criterion="thinet")
    with pytest.raises(zc.CompressError, match="data: expected batches of images"):
        zc.prune(model, macs=0.6, reconstruct=[torch.randn(2, 5, 8, 8)])
    with pytest.raises(zc.CompressError, match="at least one batch"):
        zc.prune(model, macs=0.6, reconstruct=[])
    with pytest.raises(zc.CompressError, match="at least 2 images"):
        zc.prune(model, macs=0.6, criterion="thinet", reconstruct=[torch.randn(1, 3, 64, 64)])
    with pytest.raises(zc.CompressError, match="finite numbers"):
        zc.prune(model, macs=0.6, reconstruct=[torch.full((2, 3, 64, 64), float("nan"))])


def test_images_of_several_sizes_and_odd_batches():
    model = settled("test_resnet", [torch.randn(8, 3, 64, 64)])
    images = [torch.randn(3, 3, 64, 64), torch.randn(4, 3, 96, 64), torch.randn(1, 3, 64, 64)]
    small = zc.prune(model, macs=0.7, criterion="thinet", reconstruct=[(batch, "anything") for batch in images])
    assert zc.analyze(small).macs() == pytest.approx(0.7 * zc.analyze(model).macs(), rel=0.03)
    assert [len(part) for part in parted(images, 1, 2, 3)] == [1, 2]
    assert torch.equal(
        torch.cat([part.flatten(1)[:, :9] for part in parted(images, 1, 16, 9)]), torch.cat([b.flatten(1)[:, :9] for b in images])[1::2]
    )

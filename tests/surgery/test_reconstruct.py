"""Moments are those of the inputs, least squares is least squares, statistics follow: each against an independent computation."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.surgery import moments as moments_module
from zoo_compress.surgery import reconstruct as reconstruct_module
from zoo_compress.surgery.calibrate import estimate, follow_
from zoo_compress.surgery.divergence import divergence, outputs
from zoo_compress.surgery.moments import gather
from zoo_compress.surgery.reconstruct import reconstruct_, ridge


class Net(nn.Module):
    """Two convolutions (the second of any kind), a norm or a bias, and a classifier."""

    def __init__(self, bias=False, norm=True, **second):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, second.pop("kernel_size", 3), bias=bias, **second)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 5)
        self.num_classes = 5

    def forward(self, x):
        return self.head(self.norm(self.second(self.first(x).relu())).relu().mean((2, 3)))


def batches(count=3, size=7, shape=(3, 9, 9)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, *shape, generator=generator) for _ in range(count)]


def inputs_of(model, layer, images):
    """What a layer was called with."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in images:
            model(batch)
    handle.remove()
    return torch.cat(seen)


KINDS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same"},
    {"padding": (1, 0), "dilation": 2},
    {"kernel_size": 1},
    {"groups": 2, "padding": 1},
    {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_moments_of_a_convolution_are_those_of_its_unfolded_input(kind):
    model = Net(**kind).eval()
    layout = zc.analyze(model, torch.randn(2, 3, 9, 9))
    images = batches()
    seen = gather(model, layout, images)["second.weight"]
    layer = model.second
    x = inputs_of(model, layer, images)
    if layer.padding == "same":
        x = F.pad(x, (1, 1, 1, 1))
    padding = 0 if layer.padding == "same" else layer.padding
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # (images, columns, positions)
    for half in range(2):
        rows = unfolded[half::2].movedim(1, 2).flatten(0, 1).unflatten(1, (layer.groups, -1))
        z = F.pad(rows, (0, 1), value=1.0).movedim(1, 0)
        torch.testing.assert_close(seen.sums[half], z.mT @ z, rtol=1e-4, atol=1e-3)
        assert seen.rows[half] == len(rows)


def test_moments_of_tokens(monkeypatch):
    model = timm.create_model("test_vit", num_classes=10).eval()
    images = batches(2, 4, (3, 160, 160))
    layer = model.blocks[0].mlp.fc2
    rows = inputs_of(model, layer, images)
    layout = zc.analyze(model)
    seen = gather(model, layout, images)["blocks.0.mlp.fc2.weight"]
    for half in range(2):
        z = F.pad(rows[half::2].flatten(0, 1), (0, 1), value=1.0)
        torch.testing.assert_close(seen.sums[half, 0], z.T @ z, rtol=1e-4, atol=1e-3)
    # Fewer positions than there are: as many of each image.
    monkeypatch.setattr(moments_module, "ROWS", 80)
    assert gather(model, layout, images)["blocks.0.mlp.fc2.weight"].rows == [40, 40]


class Windows(nn.Module):
    """Looks at images in four windows, each a sample in the batch; beside it a layer reads a table that has nothing to do with images."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.mix = nn.Linear(6, 6)
        self.table = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 1))
        self.register_buffer("places", torch.randn(5, 2))
        self.head = nn.Linear(6, 5)
        self.num_classes = 5

    def forward(self, x):
        x = self.embed(x.movedim(1, -1)).relu()
        windows = x.unflatten(1, (2, 4)).unflatten(3, (2, 4)).transpose(2, 3).flatten(0, 2)  # (batch × windows, 4, 4, channels)
        windows = self.mix(windows) + self.table(self.places).sum()
        return self.head(windows.unflatten(0, (len(x), 4)).mean((1, 2, 3)))


def test_moments_are_of_all_windows(monkeypatch):
    """And of every image as many positions, and of a layer that no image reaches all it reads."""
    model = Windows().eval()
    images = batches(2, 4, (3, 8, 8))
    layout = zc.analyze(model, torch.randn(2, 3, 8, 8))
    found = gather(model, layout, images)
    rows = inputs_of(model, model.mix, images).reshape(8, 64, 6)
    for half in range(2):
        z = F.pad(rows[half::2].flatten(0, 1), (0, 1), value=1.0)
        torch.testing.assert_close(found["mix.weight"].sums[half, 0], z.T @ z, rtol=1e-4, atol=1e-3)
    assert found["mix.weight"].rows == [256, 256]
    table = F.pad(inputs_of(model, model.table[1], images), (0, 1), value=1.0)
    torch.testing.assert_close(found["table.1.weight"].sums.sum(0)[0], table.T @ table, rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(moments_module, "ROWS", 80)
    assert gather(model, layout, images)["mix.weight"].rows == [40, 40]


def test_inputs_that_hardly_differ_from_their_mean_have_a_covariance():
    """Sums in single precision leave other things than covariances of such inputs: what is added before inverting makes up for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 5))
    with torch.no_grad():
        model[1].weight *= 1e-6
    model.pretrained_cfg = {"input_size": (3, 2, 2)}
    images = [torch.randn(64, 3, 2, 2) for _ in range(3)]
    seen = gather(model, zc.analyze(model), images)["2.weight"]
    covariance, mean, rows = seen.covariance()
    assert torch.linalg.eigvalsh(covariance).min() < 0, "or this shows nothing"
    assert torch.linalg.eigvalsh(covariance + ridge(covariance, rows, mean)).min() > 0


def test_sensitivity_is_the_curvature_of_the_divergence():
    """Over many draws of labels, the squared gradient by a logit has the mean p (1 - p): the diagonal of the Fisher information."""
    model = Net().eval()
    layout = zc.analyze(model, torch.randn(2, 3, 9, 9))
    images = batches(1, 4)
    with torch.no_grad():
        p = model(images[0]).softmax(1)
    draws = [gather(model, layout, images, sensitivity=True, seed=seed)["head.weight"].sensitivity for seed in range(400)]
    torch.testing.assert_close(torch.stack(draws).mean(0), (p * (1 - p)).mean(0).double(), rtol=0.15, atol=0.01)


def test_gather_leaves_the_model_alone():
    model = Net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gather(model, zc.analyze(model, torch.randn(2, 3, 9, 9)), batches(), sensitivity=True)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", [*KINDS, {"bias": True, "norm": False}, {"norm": False}], ids=str)
def test_solution_is_that_of_least_squares(kind, monkeypatch):
    """On all positions and without a ridge: numpy's least squares of the whole layer's outputs on the kept inputs."""
    monkeypatch.setattr(reconstruct_module, "RIDGE", 0.0)
    model = Net(**kind).double().eval()
    layout = zc.analyze(model, torch.randn(2, 3, 9, 9).double())
    images = [batch.double() for batch in batches()]
    moments = gather(model, layout, images)
    seen = moments["second.weight"]
    axis = layout.params["second.weight"][1]
    keep = np.array([0, 2]) if kind.get("groups") else np.array([0, 1, 3, 6])
    widths = {axis: keep}
    small = zc.resize(model, layout, widths)
    assert "second.weight" in reconstruct_(small, model, layout, widths, moments)
    layer = model.second
    x = inputs_of(model, layer, images)
    if layer.padding == "same":
        x = F.pad(x, (1, 1, 1, 1))
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, 0 if layer.padding == "same" else layer.padding, layer.stride)
    rows = unfolded.movedim(1, 2).flatten(0, 1).unflatten(1, (layer.groups, -1))
    taps = layer.weight[0, 0].numel()
    columns = (torch.from_numpy(keep)[:, None] * taps + torch.arange(taps)).flatten()
    full = layer.weight.reshape(layer.groups, -1, rows.shape[-1])
    shifts = []
    for group in range(layer.groups):
        target = (rows[:, group] @ full[group].T).detach().numpy()
        design = rows[:, group][:, columns].numpy()
        if seen.has_intercept:
            design = np.pad(design, ((0, 0), (0, 1)), constant_values=1.0)
        solution = np.linalg.lstsq(design, target, rcond=None)[0]
        found = small.second.weight.reshape(layer.groups, -1, len(columns))[group].detach().numpy()
        np.testing.assert_allclose(found, solution[: len(columns)].T, rtol=1e-3, atol=1e-4)
        shifts.append(solution[len(columns)] if seen.has_intercept else np.zeros(target.shape[1]))
    shift = np.concatenate(shifts)
    if kind.get("bias"):
        np.testing.assert_allclose((small.second.bias - model.second.bias).detach(), shift, atol=1e-4)
    elif kind.get("norm", True):
        np.testing.assert_allclose(model.norm.running_mean - small.norm.running_mean, shift, atol=1e-4)


def test_what_others_can_stand_in_for_is_lost_without_loss(monkeypatch):
    """Channels that are mixtures of others: least squares gets the outputs back, plain removal does not."""
    monkeypatch.setattr(reconstruct_module, "RIDGE", 1e-6)
    model = Net(kernel_size=1, bias=True, norm=False).eval()
    with torch.no_grad():
        model.first.weight[4:] = model.first.weight[:4] * 2
        model.first.bias[4:] = model.first.bias[:4] * 2
        model.head.weight.mul_(10)
    layout = zc.analyze(model, torch.randn(2, 3, 9, 9))
    images = batches(8)
    widths = {layout.params["first.weight"][0]: np.arange(4)}
    plain = zc.resize(model, layout, widths)
    small = zc.resize(model, layout, widths)
    reconstruct_(small, model, layout, widths, gather(model, layout, images))
    fresh = [torch.randn(16, 3, 9, 9)]
    expected = outputs(model, fresh)
    assert divergence(outputs(small, fresh), expected, logits=True) < 1e-3 * divergence(outputs(plain, fresh), expected, logits=True)


def test_a_weight_that_is_computed_from_its_parameter_is_left_alone():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / self.weight.norm(), self.bias, self.stride, self.padding)

    model = Net().eval()
    model.second = Standardised(8, 6, 3)
    layout = zc.analyze(model, torch.randn(2, 3, 9, 9))
    assert layout.axes[layout.params["second.weight"][1]].frozen is None
    assert "second.weight" not in gather(model, layout, batches())


def test_a_norm_takes_the_shift_only_if_nothing_else_reads_the_layer():
    class Forked(Net):
        def forward(self, x):
            y = self.second(self.first(x).relu())
            return self.head((self.norm(y) + y).relu().mean((2, 3)))

    layout = zc.analyze(Forked(), torch.randn(2, 3, 9, 9))
    assert gather(Forked().eval(), layout, batches())["second.weight"].norm is None
    assert gather(Net().eval(), layout, batches())["second.weight"].norm == "norm.running_mean"


def shifted(model):
    """A model whose stored statistics are not those of the data."""
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 2.0)
    return model


def test_calibrate_finds_the_statistics_of_the_data():
    model = shifted(Net()).train()
    images = batches()
    expected = [model.second(model.first(batch).relu()).detach() for batch in images]
    assert zc.calibrate(model, [(batch, None) for batch in images]) is model
    torch.testing.assert_close(model.norm.running_mean, torch.stack([y.mean((0, 2, 3)) for y in expected]).mean(0))
    torch.testing.assert_close(model.norm.running_var, torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in expected]).mean(0))
    assert model.training
    assert model.norm.momentum == 0.1


@pytest.mark.parametrize(
    "data", [[], 3, ["image"], [torch.zeros(2, 3, 9, 9, dtype=torch.long)], [torch.randn(2, 3, 9, 9), torch.randn(2, 4, 9, 9)]]
)
def test_calibrate_with_bad_data_changes_nothing(data):
    model = shifted(Net())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(zc.CompressError, match="data: expected"):
        zc.calibrate(model, data)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.norm.momentum == 0.1


def test_statistics_follow_the_removal():
    """Stored statistics move as the estimates do, whatever they were; a model that lost nothing keeps its own to the bit."""
    model = shifted(Net(kernel_size=1)).eval()
    layout = zc.analyze(model, torch.randn(2, 3, 9, 9))
    images = batches()
    same = zc.resize(model, layout, {})
    follow_(same, model, layout, {}, images)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    widths = {layout.params["first.weight"][0]: np.arange(5), layout.params["second.weight"][0]: np.array([1, 4, 5])}
    small = zc.resize(model, layout, widths)
    follow_(small, model, layout, widths, images)
    (old_mean, old_var), (new_mean, new_var) = (
        [estimate(m, images)[f"norm.running_{key}"] for key in ("mean", "var")] for m in (model, small)
    )
    stored_mean, stored_var = model.norm.running_mean[[1, 4, 5]], model.norm.running_var[[1, 4, 5]]
    old_mean, old_var = old_mean[[1, 4, 5]], old_var[[1, 4, 5]]
    torch.testing.assert_close(small.norm.running_var / stored_var, new_var / old_var)
    torch.testing.assert_close((small.norm.running_mean - stored_mean) / stored_var.sqrt(), (new_mean - old_mean) / old_var.sqrt())


@pytest.mark.parametrize("stored", [1.0, 8.0])
def test_a_channel_that_is_dead_on_the_images_keeps_its_statistics(stored):
    """It may be alive on others: neither is divided by the nothing that it varies here, nor is its variance nothing."""
    model = shifted(Net(kernel_size=1)).eval()
    with torch.no_grad():
        model.second.weight[1] = 0
        model.second.weight[4, 5:] = 0
        model.second.weight[4, :5] *= 1e-6  # hardly alive, and the more so without some inputs
    model.norm.running_var[[1, 4]] = stored
    layout = zc.analyze(model, torch.randn(2, 3, 9, 9))
    widths = {layout.params["first.weight"][0]: np.array([2, 5, 6])}
    small = zc.resize(model, layout, widths)
    follow_(small, model, layout, widths, batches())
    for key in ("running_mean", "running_var"):
        found, before = (getattr(m.norm, key) for m in (small, model))
        assert torch.equal(found[[1, 4]], before[[1, 4]])
        assert (found != before)[[0, 2, 3, 5]].all(), "the others follow"


def test_a_channel_that_dies_with_the_removal_keeps_its_variance():
    """What it gave on average stays right; whatever wakes it on other images is scaled as before."""
    model = shifted(Net(kernel_size=1)).eval()
    with torch.no_grad():
        model.second.weight[1, :5] = 0
    layout = zc.analyze(model, torch.randn(2, 3, 9, 9))
    widths = {layout.params["first.weight"][0]: np.arange(5)}
    small = zc.resize(model, layout, widths)
    images = batches()
    follow_(small, model, layout, widths, images)
    assert small.norm.running_var[1] == model.norm.running_var[1]
    before = estimate(model, images)
    shift = before["norm.running_mean"][1] * (model.norm.running_var[1] / before["norm.running_var"][1]).sqrt()
    torch.testing.assert_close(small.norm.running_mean[1], model.norm.running_mean[1] - shift)


@pytest.mark.parametrize("change", [lambda m, x: zc.prune(m, macs=0.8, reconstruct=x), lambda m, x: zc.factorize(m, macs=0.8, data=x)])
def test_a_model_with_a_dead_channel_stays_finite(change):
    model = timm.create_model("test_efficientnet", num_classes=10).eval()
    block = next(m for m in model.modules() if hasattr(m, "conv_dw"))
    block.bn2.running_var[:4] = 8
    images = batches(1, 8, (3, 64, 64))
    with torch.no_grad():
        block.conv_dw.weight[:4] = 0
        assert change(model, images).eval()(images[0]).isfinite().all()

"""Groups of channels: factors see the loss, those at zero go, the others' factors go into the layers that read them."""

import numpy as np
import pytest
import timm
import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.groups import GroupsConfig, groups_of
from zoo_compress.methods.selection import SCALES

MODELS = {
    "resnext": (
        "resnext50_32x4d",
        {"layers": [1, 1, 1, 1], "cardinality": 4, "base_width": 8, "channels": [16, 32, 32, 64], "zero_init_last": False},
        32,
    ),
    "vit": ("deit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}, 32),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "drop_path_rate": 0.0},
        32,
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    name, args, size = MODELS[request.param]
    torch.manual_seed(0)
    return timm.create_model(name, **args, num_classes=10, pretrained_cfg_overlay={"input_size": (3, size, size)})


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 10


def start(model, config, lr=0.05):
    net = config.wrap(model)
    task = config.task(ClassificationTask(net, verbose=False), 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    task.start_epoch(0, 1, optimizer, 1)
    return net, task.train(), optimizer


def sizes_of(model):
    return [grouped.size for grouped in groups_of(model, zc.analyze(model))]


def test_factors_begin_at_one_and_change_nothing(model):
    expected, sizes = model.eval()(batch()[0]), sizes_of(model)
    net, task, _ = start(model, GroupsConfig())
    assert len(task.scales) == sum(sizes) > 4
    torch.testing.assert_close(net.eval()(batch()[0]), expected)


def test_gradients_of_factors_are_those_of_the_loss(model):
    """Every factor's, against finite differences: none is of a group that something reads without it."""
    net, task, _ = start(model, GroupsConfig())
    net.double()
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    images, target = batch()
    images, small = images.double(), 1e-7  # less likely to cross a kink of a ReLU
    generator = torch.Generator().manual_seed(2)
    base = 1 + 0.2 * torch.randn(len(task.scales), generator=generator, dtype=torch.float64)

    def loss(factors):
        net.get_buffer(SCALES).copy_(factors)
        with torch.no_grad():
            return float(task(images, target)["loss"])

    units = torch.eye(len(base), dtype=torch.float64)
    expected = torch.tensor([(loss(base + small * unit) - loss(base - small * unit)) / (2 * small) for unit in units])
    net.get_buffer(SCALES).copy_(base)
    task(images, target)["loss"].backward()
    torch.testing.assert_close(task.factors.leaf.grad, expected.double(), rtol=1e-3, atol=1e-6)
    assert (task.factors.leaf.grad != 0).all()


def test_groups_at_zero_are_removed_and_the_others_keep_their_factors(model, tmp_path):
    config, sizes, macs = GroupsConfig(), sizes_of(model), zc.analyze(model).macs()
    net, task, _ = start(model, config)
    factors = torch.linspace(0.5, -1.5, sum(sizes))
    starts = np.cumsum([0, *sizes])[:-1]
    factors[starts + 1] = 0.0
    factors[: sizes[0]] = 0.0  # of an axis that goes whole one stays, switched off
    net.get_buffer(SCALES).copy_(factors)
    expected = net.eval()(batch()[0])
    task.end()
    small = config.finish(net, ()).eval()
    torch.testing.assert_close(small(batch()[0]), expected, rtol=1e-4, atol=1e-5)
    assert sizes_of(small) == [size - 1 for size in sizes[1:]], "one of one is no choice"
    assert zc.analyze(small).macs() < macs
    zc.verify(small, zc.analyze(small))
    zc.save(small, tmp_path / "small")
    again = zc.load(tmp_path / "small").eval()
    assert torch.equal(again(batch()[0]), small(batch()[0]))


def test_the_average_runs_with_its_own_factors(model):
    net, task, _ = start(model, GroupsConfig())
    task.setup_ema(decay=0.9)
    average = unwrap_model(task.get_trainable_module(ema=True)).eval()
    images, target = batch()
    with torch.no_grad():
        expected = average(images)
        net.get_buffer(SCALES).fill_(0.1)
        task(images, target)
        assert torch.equal(average(images), expected)
        average.get_buffer(SCALES).fill_(0.1)
        assert not torch.allclose(average(images), expected)


def test_networks_without_groups_are_refused():
    with pytest.raises(CompressError, match="ResNet has no groups of channels that can be removed"):
        GroupsConfig().wrap(timm.create_model("resnet18", num_classes=10))

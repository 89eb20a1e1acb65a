"""Sparse structure selection: factors follow the paper's rule, blocks at zero go, the others' factors go into their weights."""

import pytest
import timm
import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from zoo_compress.errors import CompressError
from zoo_compress.methods.blocks import BlocksConfig, blocks_of
from zoo_compress.methods.selection import SelectionTask
from zoo_compress.surgery.blocks import Skip

ARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 10, "in_chans": 1}


def make():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", **ARGS, pretrained_cfg_overlay={"input_size": (1, 16, 16), "mean": (0,), "std": (1,)})


def batch(count=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 16, 16, generator=generator), torch.arange(count) % 10


def start(config, lr=0.1):
    net = config.wrap(make())
    task = config.task(ClassificationTask(net, verbose=False), 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    task.start_epoch(0, 1, optimizer, 1)
    return net, task.train(), optimizer


def step(task, optimizer):
    optimizer.zero_grad()
    task(*batch())["loss"].backward()
    optimizer.step()


def test_factors_begin_at_one_and_change_nothing():
    net, task, _ = start(BlocksConfig())
    torch.testing.assert_close(net.eval()(batch()[0]), make().eval()(batch()[0]))
    assert torch.equal(task.scales, torch.ones(3))


def test_gradients_of_factors_are_those_of_the_loss():
    net, task, _ = start(BlocksConfig())
    net.eval()  # no dropout: finite differences need the same network
    images, target = batch()

    def loss(factors):
        net.structure_scales.copy_(factors)
        return float(torch.nn.functional.cross_entropy(net(images), target))

    net.double()
    images = images.double()
    base, small = torch.tensor([0.9, 0.5, 1.2], dtype=torch.float64), 1e-5
    expected = [(loss(base + small * unit) - loss(base - small * unit)) / (2 * small) for unit in torch.eye(3, dtype=torch.float64)]
    net.structure_scales.copy_(base)
    net.train()
    task(images, target)["loss"].backward()
    torch.testing.assert_close(task.factors.leaf.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7)


def test_the_step_is_accelerated_proximal_gradient():
    """Huang & Wang 2018, equation 10, worked out for one factor after another."""
    config = BlocksConfig(penalty=0.3, momentum=0.8)
    _, task, optimizer = start(config, lr=0.05)
    factors, velocity = [1.0] * 3, [0.0] * 3
    for _ in range(4):
        optimizer.zero_grad()
        task(*batch())["loss"].backward()
        gradient = task.factors.leaf.grad.tolist()
        optimizer.step()
        for i in range(3):
            moved = factors[i] - 0.05 * gradient[i]
            shrunk = max(abs(moved) - 0.05 * 0.3, 0) * (1 if moved > 0 else -1)
            velocity[i] = shrunk - factors[i] + 0.8 * velocity[i]
            factors[i] = shrunk + 0.8 * velocity[i]
        torch.testing.assert_close(task.scales, torch.tensor(factors))


def test_gradients_add_up_until_the_step():
    """Halves of a batch, with half the loss each, move factors as the whole does; so do they with one backward pass for both."""
    images, target = batch()
    halves = list(zip(images.chunk(2), target.chunk(2), strict=True))

    def apart(task):
        for half in halves:
            (task(*half)["loss"] / 2).backward()

    ways = {
        "whole": lambda task: task(images, target)["loss"].backward(),
        "apart": apart,
        "together": lambda task: sum(task(*half)["loss"] / 2 for half in halves).backward(),
    }
    found = {}
    for name, backward in ways.items():
        _, task, optimizer = start(BlocksConfig(penalty=1e-4))
        for _ in range(2):
            optimizer.zero_grad()
            backward(task)
            optimizer.step()
        found[name] = task.scales
    assert not torch.equal(found["whole"], torch.ones(3))
    torch.testing.assert_close(found["apart"], found["whole"])
    torch.testing.assert_close(found["together"], found["whole"])


def test_what_the_penalty_switches_off_is_removed():
    config = BlocksConfig(penalty=50.0)
    net, task, optimizer = start(config)
    for _ in range(3):
        step(task, optimizer)
    assert torch.equal(task.scales, torch.zeros(3)), "exactly, not nearly"
    expected = net.eval()(batch()[0])
    task.end()
    small = config.finish(net, ())
    assert all(isinstance(block, Skip) for block in small.blocks)
    torch.testing.assert_close(small.eval()(batch()[0]), expected)


def test_factors_of_blocks_that_stay_go_into_their_weights():
    config = BlocksConfig(penalty=1e-3)
    net, task, optimizer = start(config)
    for _ in range(3):
        step(task, optimizer)
    with torch.no_grad():
        task.scales.copy_(torch.tensor([0.6, 0.0, -0.4]))
    expected = net.eval()(batch()[0])
    task.end()
    small = config.finish(net, ())
    torch.testing.assert_close(small.eval()(batch()[0]), expected)
    assert [isinstance(block, Skip) for block in small.blocks] == [False, True, False]
    assert set(small.state_dict()) < set(make().state_dict())


def test_the_average_runs_with_its_own_factors():
    net, task, _ = start(BlocksConfig())
    task.setup_ema(decay=0.9)
    average = unwrap_model(task.get_trainable_module(ema=True)).eval()
    images, target = batch()
    with torch.no_grad():
        expected = average(images)
        net.structure_scales.fill_(0.1)
        assert torch.equal(average(images), expected)
    task(images, target)
    with torch.no_grad():  # nor with those that are being trained
        assert torch.equal(average.train()(images), expected)
        average.structure_scales.fill_(0.1)
        assert torch.equal(average.eval()(images), net.eval()(images))


def test_blocks_at_exactly_zero_are_removed_where_a_scale_follows_their_end():
    """What ConvNeXt adds is in proportion to its end, which shows only while the end gives something."""
    config = BlocksConfig()
    torch.manual_seed(0)
    net = config.wrap(timm.create_model("test_convnext", num_classes=5)).eval()
    first, *others = (block.path for block in blocks_of(net))
    task = config.task(ClassificationTask(net, verbose=False), 0)
    with torch.no_grad():
        task.scales.copy_(torch.linspace(0.5, 1.5, len(task.scales)))
        task.scales[0] = 0.0
    images = torch.randn(2, 3, 64, 64)
    expected = net(images)
    task.end()
    small = config.finish(net, ())
    assert isinstance(small.get_submodule(first), Skip)
    assert [block.path for block in blocks_of(small)] == others
    torch.testing.assert_close(small(images), expected)


def test_networks_without_residual_blocks_are_refused():
    with pytest.raises(CompressError, match="EfficientNet has no residual block that can be removed"):
        BlocksConfig().wrap(timm.create_model("test_efficientnet", num_classes=10))
    with pytest.raises(CompressError, match=r"expected a network made by BlocksConfig\.wrap"):
        SelectionTask(ClassificationTask(make(), verbose=False), BlocksConfig())


@pytest.mark.parametrize("settings", [{"penalty": 0}, {"penalty": float("nan")}, {"momentum": 1.0}, {"least": 2.0}, {"more": 1}], ids=str)
def test_bad_settings(settings):
    with pytest.raises(CompressError, match="expected"):
        BlocksConfig(**settings)

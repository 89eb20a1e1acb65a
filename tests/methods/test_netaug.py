"""A larger network around a base, of which nothing stays."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import unwrap_model
from torch import nn

import zoo_compress as zc
from zoo_compress.methods.netaug import NetAugTask


def base_model(name="test_efficientnet"):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model


def batch(model, size=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, *model.default_cfg["input_size"], generator=generator), torch.arange(size) % 5


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit", "test_byobnet"])
def test_the_base_is_inside(name, tmp_path):
    base = base_model(name)
    images, _ = batch(base)
    net = zc.netaug(base, 3, 3)
    small = net.export()
    with torch.no_grad():
        assert torch.equal(net(images), base(images))
        assert torch.equal(small(images), base(images))
    assert type(small) is type(base)
    assert small.pretrained_cfg["architecture"] == name
    assert not hasattr(small, "private")
    assert list(small.state_dict()) == list(base.state_dict())
    zc.save(small, tmp_path / "small")
    again = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images), base(images))


def test_the_largest_is_r_times_as_wide():
    base = base_model("test_resnet")
    layout = zc.analyze(base)
    net = timm.create_model("test_resnet__netaug", num_classes=5, r=3, s=2)
    assert {name: size / layout.axes[name].size for name, size in net.layout.base_sizes.items()} == dict.fromkeys(layout.free, 3)
    seen = {name: set() for name in layout.free}
    for seed in range(40):
        net.draw(np.random.default_rng(seed))
        for name, size in net.sizes.items():
            seen[name].add(size / layout.axes[name].size)
    assert all(sizes == {1, 2, 3} for sizes in seen.values())  # w, 2w, 3w, each axis by itself
    net.set_base()
    assert net.sizes == {name: layout.axes[name].size for name in layout.free}


def test_without_residual_widths_only_what_one_layer_writes_is_augmented():
    net = timm.create_model("test_resnet__netaug", num_classes=5)
    base = net.sizes
    changed = set()
    for seed in range(20):
        net.draw(np.random.default_rng(seed), residual=False)
        changed |= {name for name, size in net.sizes.items() if size != base[name]}
    writers = {
        name: sum(name in dims[0].split() for key, dims in net.layout.params.items() if len(dims) == 4 and key in net.layout.trained)
        for name in base
    }
    assert changed == {name for name, count in writers.items() if count == 1}


def test_a_step_is_that_of_the_base_and_of_a_drawn_network():
    net = zc.netaug(base_model("test_resnet"), 2, 1).train()
    images, target = batch(net)
    static = net.export().train()
    net.draw(np.random.default_rng([3, 0]))
    drawn = net.sizes
    task = NetAugTask(ClassificationTask(net, verbose=False), alpha=0.5, seed=3).train()
    result = task(images, target)
    assert net.sizes == dict(net._settings.base.items())
    assert torch.allclose(result["base_loss"], nn.functional.cross_entropy(static(images), target))
    net.set_widths(drawn)
    assert torch.allclose(result["aug_loss"], nn.functional.cross_entropy(net(images), target))
    assert torch.allclose(result["loss"], result["base_loss"] + 0.5 * result["aug_loss"])
    result["loss"].backward()
    assert all(p.grad is not None for p in net.parameters())


def test_draws_go_on_where_a_saved_state_stopped():
    net = zc.netaug(base_model("test_resnet"), 2, 3)
    images, target = batch(net)
    one, two = (NetAugTask(ClassificationTask(copy.deepcopy(net), verbose=False), seed=5).train() for _ in range(2))
    for task in (one, two):
        task(images, target)
    state = one.get_task_state()
    three = NetAugTask(ClassificationTask(copy.deepcopy(two.net), verbose=False), seed=5).train()
    three.load_task_state(state)
    assert torch.equal(two(images, target)["aug_loss"], three(images, target)["aug_loss"])


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_resnet"])
def test_sorting_changes_the_base_and_not_the_whole(name):
    net = zc.netaug(base_model(name), 2, 2).train()
    images, _ = batch(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.set_widths({})
    net(images).sum().backward()
    optimizer.step()
    whole = net.double()
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    twin = copy.deepcopy(whole)
    before = {key: state["momentum_buffer"].clone() for key, state in optimizer.state.items()}
    net.sort_(optimizer)
    with torch.no_grad():
        assert torch.allclose(whole(images.double()), twin(images.double()), rtol=1e-9)
        # A step of the optimizer along its state commutes with the sorting.
        for (parameter, old), momentum in zip(zip(net.parameters(), twin.parameters(), strict=True), before.values(), strict=True):
            parameter.sub_(optimizer.state[parameter]["momentum_buffer"])
            old.sub_(momentum)
        assert torch.allclose(whole(images.double()), twin(images.double()), rtol=1e-9)
    inner = sorted(net._settings.inner)
    assert inner
    for axis in inner:
        reads = [(key, d) for key, d in net.layout.params.items() if key in net.layout.trained and len(d) > 1 and d[1] == axis]
        twin.sort_()
        if len(reads) == 1:
            sums = twin.get_parameter(reads[0][0]).detach().abs().movedim(1, 0).flatten(1).sum(1)
            assert (sums.diff() <= 1e-12).all()


def test_an_epoch_sorts_and_then_leaves_residual_widths_alone():
    net = zc.netaug(base_model("test_resnet"), 2, 1)
    task = NetAugTask(ClassificationTask(net, verbose=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for epoch, residual in ((0, True), (1, True), (2, False), (3, False)):
        task.start_epoch(epoch, 4, optimizer)
        assert task.residual is residual


def test_the_average_is_sorted_as_the_network_is():
    """Whatever its own weights are: what is averaged afterwards are the same channels."""
    net = zc.netaug(base_model(), 2, 1)
    task = NetAugTask(ClassificationTask(net, verbose=False))
    task.setup_ema(decay=0.9)
    average = unwrap_model(task.get_trainable_module(ema=True))
    with torch.no_grad():
        for weight, other in zip(net.parameters(), average.parameters(), strict=True):
            weight.normal_()
            # The least important of the one is the most important of the other; both say which channels they have.
            other.copy_(1 / weight)
    task.start_epoch(0, 1, torch.optim.SGD(net.parameters(), lr=0.1))
    for weight, other in zip(net.parameters(), average.parameters(), strict=True):
        assert torch.equal(other, 1 / weight)


def test_statistics_of_the_base_are_found_again():
    base = base_model("test_resnet")
    net = zc.netaug(base, 2, 1)
    images, _ = batch(base, 8)
    NetAugTask(ClassificationTask(net, verbose=False)).prepare_evaluation(net, [images])
    expected = zc.calibrate(copy.deepcopy(base), [images])
    with torch.no_grad():
        assert torch.equal(net.eval()(images), expected(images))


def test_distillation_goes_on_top():
    base = base_model("test_resnet")
    net, teacher = zc.netaug(base, 2, 1).train(), copy.deepcopy(base)
    images, target = batch(base)
    result = NetAugTask(LogitDistillationTask(net, teacher, task_loss_weight=0.5, verbose=False)).train()(images, target)
    result["loss"].backward()
    assert result["loss"].isfinite()
    assert net.get_parameter("fc.weight" if hasattr(net, "fc") else "head.fc.weight").grad is not None


def test_a_pruned_model_can_be_augmented():
    small = timm.create_model("test_resnet__pruned", keep=0.5, num_classes=5).eval()
    images, _ = batch(small)
    net = zc.netaug(small, 2, 1)
    with torch.no_grad():
        assert torch.equal(net.export()(images), small(images))
    assert net.export().pretrained_cfg["architecture"] == "test_resnet__pruned"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0.5}, "r, the largest width in base widths, of at least 1, found 0.5"),
        ({"r": "3"}, "found '3'"),
        ({"r": float("inf")}, "found inf"),
        ({"s": 0}, "s, a number of steps of at least 1, found 0"),
        ({"s": 1.5}, "found 1.5"),
        ({"widths": (1.0,)}, "expected r=, s=, found widths="),
        ({"features_only": True}, "expected a classifier"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(zc.CompressError, match=message):
        timm.create_model("test_resnet__netaug", **arguments)


def test_a_model_that_cannot_grow():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    with pytest.raises(zc.CompressError, match="no axis of Sequential may grow"):
        zc.netaug(model, layout=zc.analyze(model, torch.randn(2, 3, 4, 4)))


def test_what_is_saved_is_what_it_exports(tmp_path):
    net = zc.netaug(base_model("test_resnet"), 2, 1)
    with pytest.raises(zc.CompressError, match="export"):
        zc.save(net, tmp_path / "net")
    assert not (tmp_path / "net").exists()

"""Training networks with exits: what the loss is, what moves, and what the tasks inside are asked."""

import copy

import pytest
import timm
import torch
from timm.task import ClassificationTask, LogitDistillationTask
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.errors import CompressError

SIZE = {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}
TARGET = torch.tensor([0, 1, 2, 3])


@pytest.fixture
def net():
    return zc.add_exits(timm.create_model("test_resnet", num_classes=10, **SIZE), 2)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def task(net, **config):
    return zc.ExitsTask(ClassificationTask(net, verbose=False), zc.ExitsConfig(**config)).train()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("equal", [1 / 3] * 3), ("msdnet", [1, 1, 1]), ("branchynet", [1, 1, 0.3]), ((0.5, 0, 2), [0.5, 0, 2])],
)
def test_the_loss_is_the_weighted_sum(net, images, weights, expected):
    found = task(net, weights=weights)(images, TARGET)
    net.train()
    losses = [F.cross_entropy(out, TARGET) for out in copy.deepcopy(net)(images)]
    torch.testing.assert_close(found["loss"], sum(w * loss for w, loss in zip(expected, losses, strict=True)))
    assert found["output"].shape == (4, 10)
    assert ("loss_1" in found) == (expected[1] > 0)


def test_exits_learn_from_the_last_and_it_learns_nothing_from_them(net, images):
    found = task(net, distill=1.0, weights=(1.0, 1.0, 0.0), temperature=3.0)(images, TARGET)
    outs = copy.deepcopy(net)(images)
    teacher = (outs[-1] / 3).softmax(1)
    expected = sum(9 * (teacher * (teacher.log() - (out / 3).log_softmax(1))).sum(1).mean() for out in outs[:-1])
    torch.testing.assert_close(found["loss"], expected)
    found["loss"].backward()
    assert net.fc.weight.grad is None


def test_a_teacher_is_asked_once_a_batch(net, images):
    teacher = timm.create_model("test_resnet", num_classes=10)
    asked = []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    inner = LogitDistillationTask(net, teacher, task_loss_weight=0.5, verbose=False)
    wrapped = zc.ExitsTask(inner, zc.ExitsConfig(weights="msdnet")).train()
    found = wrapped(images, TARGET)["loss"]
    assert len(asked) == 1
    outs = copy.deepcopy(net)(images)
    inner.train()
    losses = []
    for out in outs:
        inner.trainable_module.forward = lambda *_, out=out: out
        losses.append(inner(images, TARGET)["loss"])
    torch.testing.assert_close(found, sum(losses))


@pytest.mark.parametrize(("train", "heads_move", "trunk_moves"), [("joint", True, True), ("heads", True, False), ("main", False, True)])
def test_what_is_trained(net, images, train, heads_move, trunk_moves):
    wrapped = task(net, train=train)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    wrapped(images, TARGET)["loss"].backward()
    optimizer.step()
    moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    heads = {name for name in before if name.startswith("exits.") and "bias" in name}
    assert (heads <= moved) == heads_move
    assert bool(moved & heads) == heads_move
    # Statistics of the trunk's norms count as part of it.
    assert bool({name for name in moved if not name.startswith("exits.")}) == trunk_moves


@pytest.mark.parametrize("train", ["joint", "heads", "main"])
def test_what_was_frozen_trains_again_afterwards(net, train):
    first = next(net.parameters()).requires_grad_(False)  # as its owner wants it
    task(net, train=train).end()
    assert [parameter for parameter in net.parameters() if not parameter.requires_grad] == [first]


def test_joint_training_lowers_the_loss_of_every_exit(net, images):
    wrapped = task(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    history = []
    for _ in range(8):
        optimizer.zero_grad()
        found = wrapped(images, TARGET)
        found["loss"].backward()
        optimizer.step()
        history.append([float(found[f"loss_{i}"]) for i in range(3)])
    assert all(last < first for first, last in zip(history[0], history[-1], strict=True))


def test_it_is_a_task_like_the_one_inside(net):
    inner = ClassificationTask(net, verbose=False)
    wrapped = zc.ExitsTask(inner)
    assert wrapped.get_trainable_module() is net
    wrapped.setup_ema(decay=0.5)
    assert wrapped.has_ema()
    wrapped.update_ema()
    assert wrapped.get_checkpoint_state()["state_dict"].keys() == net.state_dict().keys()
    assert wrapped.get_eval_model().eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"weights": "alike"}, "equal, branchynet, msdnet"),
        ({"weights": (0.0, 0.0)}, "not all 0"),
        ({"weights": (1.0, -1.0)}, "from 0 on"),
        ({"weights": (1.0, float("nan"))}, "from 0 on"),
        ({"distill": 1.5}, "distill"),
        ({"temperature": 0}, "temperature"),
        ({"train": "all"}, "'joint', 'main' or 'heads', found 'all'"),
    ],
)
def test_bad_configs(config, said):
    with pytest.raises(CompressError, match=said):
        zc.ExitsConfig(**config)


def test_bad_tasks(net):
    inner = ClassificationTask(net, verbose=False)
    with pytest.raises(CompressError, match="expected 3, one an exit"):
        zc.ExitsTask(inner, zc.ExitsConfig(weights=(1.0, 1.0)))
    with pytest.raises(CompressError, match="early exit"):
        zc.ExitsTask(inner, zc.ExitsConfig(weights=(0.0, 0.0, 1.0), train="heads"))
    with pytest.raises(CompressError, match="network with exits, found ResNet"):
        zc.ExitsTask(ClassificationTask(timm.create_model("test_resnet"), verbose=False))
    with pytest.raises(CompressError, match="network with exits"):
        zc.ExitsTask(ClassificationTask(net.export(0), verbose=False))
    with pytest.raises(CompressError, match="found ResNetWithExits"):
        zc.ExitsTask(net)

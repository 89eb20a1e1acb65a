"""One network with two knobs: how wide it is and where it ends."""

import copy

import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.exits import ExitsConfig
from zoo_compress.methods.slim import SlimConfig, SlimTask
from zoo_compress.methods.us import UsConfig, UsTask
from zoo_compress.training.task import nested

SIZE = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
TARGET = torch.arange(4)


def make(name="test_resnet", **options):
    torch.manual_seed(0)
    net = zc.add_exits(timm.create_model(name, num_classes=10, **SIZE), 2)
    return zc.slim(net, (0.5, 1.0), **options)


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 64, 64) * torch.linspace(0.3, 3, 4)[:, None, None, None]


@pytest.fixture
def trained(images):
    """After a few steps, in which every width got statistics of its own."""
    net = make()
    task = SlimTask(zc.ExitsTask(ClassificationTask(net, verbose=False))).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        task(images, TARGET)["loss"].backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def every(net, x):
    with net.every_output(), torch.no_grad():
        return net(x)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_each_pair_is_the_static_model_to_the_bit(name, images):
    net = make(name).eval().requires_grad_(False)
    for width in net.widths:
        net.set_width(width)
        found = [net.infer(images, exit=exit) for exit in range(3)]
        assert all(map(torch.equal, found, every(net, images)))
        for exit in range(3):
            net.set_exit(exit)
            assert torch.equal(net(images), found[exit])
            if exit < 2:
                assert torch.equal(net.infer(images), found[exit])  # what was chosen
        static = net.export(width)
        assert torch.equal(static.infer(images, exit=2), found[2])
        for exit in range(2):
            short = net.export(width, exit=exit)
            assert torch.equal(short.eval()(images), found[exit])
        assert static.costs() == net.costs()
        assert net.costs()[-1] == net.macs()


def test_a_pair_saves_and_reloads(trained, images, tmp_path):
    short = trained.export(0.5, exit=1).eval()
    zc.save(short, tmp_path)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), short(images))


def test_both_knobs_and_thresholds_survive_the_file(trained, images, tmp_path):
    trained.calibrate([images], 0.8)
    zc.save(trained, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.pretrained_cfg["architecture"] == "test_resnet__slim"
    assert again.record == trained.record
    for width in (0.5, 1.0):
        for net in (trained, again):
            net.set_width(width)
        assert all(map(torch.equal, every(trained, images), every(again, images)))
        assert torch.equal(again.infer(images), trained.infer(images))


def test_samples_leave_at_any_width(trained, images):
    trained.set_width(0.5)
    outs = every(trained, images)
    sure = outs[0].softmax(1).amax(1)
    logits, left = trained.infer(images, threshold=[float(sure.median()), None], return_exits=True)
    assert set(left.tolist()) == {0, 2}
    torch.testing.assert_close(logits, torch.stack([outs[exit][i] for i, exit in enumerate(left)]), rtol=1e-4, atol=1e-4)


def test_made_by_name(images):
    net = timm.create_model("test_resnet__slim", widths=(0.5, 1.0), exits=2, num_classes=10, **SIZE)
    assert net.knobs() == {"width": (0.5, 1.0), "exit": (0, 1, 2)}
    net.set_width(0.5)
    assert len(net.train()(images)) == 3


def test_slim_training_adds_up_every_width_and_exit(images):
    net = make()
    found = SlimTask(zc.ExitsTask(ClassificationTask(net, verbose=False), zc.ExitsConfig(weights=(1.0, 0.5, 2.0)))).train()(images, TARGET)
    expected = 0
    for width in (1.0, 0.5):
        net.set_width(width)
        expected += sum(w * F.cross_entropy(out, TARGET) for w, out in zip((1.0, 0.5, 2.0), net(images), strict=True))
    torch.testing.assert_close(found["loss"], expected)


def test_us_training_teaches_every_exit_of_narrow_widths(images):
    net = make(universal=True)
    task = UsTask(zc.ExitsTask(ClassificationTask(net, verbose=False), zc.ExitsConfig(weights=(1.0, 0.5, 2.0))), samples=2).train()
    found = task(images, TARGET)
    weights = (1.0, 0.5, 2.0)
    net.set_width(1.0)
    outs = net(images)
    soft = outs[-1].detach().softmax(1)
    expected = sum(w * F.cross_entropy(out, TARGET) for w, out in zip(weights, outs, strict=True))
    net.set_width(0.5)
    expected = expected + sum(w * F.cross_entropy(out, soft) for w, out in zip(weights, net(images), strict=True))
    torch.testing.assert_close(found["loss"], expected)
    found["loss"].backward()
    assert all(head.fc.weight.grad is not None for head in net.exits)


def test_heads_alone_move_at_every_width(images):
    net = make()
    task = SlimTask(zc.ExitsTask(ClassificationTask(net, verbose=False), zc.ExitsConfig(train="heads"))).train()
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    task(images, TARGET)["loss"].backward()
    optimizer.step()
    moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("exits.") for name in moved)
    with pytest.raises(CompressError, match="trained as a whole"):
        UsTask(zc.ExitsTask(ClassificationTask(make(universal=True), verbose=False), zc.ExitsConfig(train="heads")))


def test_methods_of_a_recipe_compose(images):
    exits, slim = ExitsConfig(exits=2, weights="msdnet", budget=0.8), SlimConfig(widths=(0.5, 1.0))
    method = nested([exits, slim])
    net = method.wrap(timm.create_model("test_resnet", num_classes=10, **SIZE))
    assert net.widths == (0.5, 1.0)
    assert len(net.exits) == 2
    task = method.task(ClassificationTask(net, verbose=False), 0)
    assert isinstance(task, SlimTask)
    task.train()(images, TARGET)["loss"].backward()
    assert net.record.thresholds is None
    assert method.finish(net.eval(), [images], [images]) is net
    assert net.record.thresholds is not None
    assert method.needs_held_out
    # What is made already is trained on as it is.
    again = nested([ExitsConfig(), slim])
    assert again.wrap(net) is net
    with pytest.raises(CompressError, match=r"expected the widths of the model, a network of 0\.5, 1, found 0\.25, 1"):
        nested([ExitsConfig(), SlimConfig(widths=(0.25, 1.0))]).wrap(net)
    with pytest.raises(CompressError, match=r"a network of 0\.5, 1, found a universal network of 0\.5, 1"):
        UsConfig(widths=(0.5, 1.0)).wrap(net)
    with pytest.raises(CompressError, match="expected slim last"):
        nested([slim, exits])
    with pytest.raises(CompressError, match="which has none"):
        ExitsConfig().wrap(timm.create_model("test_resnet"))
    with pytest.raises(CompressError, match="SlimTask, which goes around"):
        zc.ExitsTask(SlimTask(ClassificationTask(net, verbose=False)))
    assert UsConfig(widths=(0.5, 1.0)).wrap(make(universal=True)).universal


def test_the_other_order_is_refused():
    net = zc.slim(timm.create_model("test_resnet", **SIZE), (0.5, 1.0))
    with pytest.raises(CompressError, match=r"add exits first, then zoo_compress.slim\(net, widths\)"):
        zc.add_exits(net, 2)
    with pytest.raises(CompressError, match="has no early exits"):
        net.export(0.5, exit=1)

"""Networks with exits: what they give, who leaves where, and that nothing later runs."""

import copy
import threading

import pytest
import timm
import torch
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.surgery.leaving import MEASURES
from zoo_compress.surgery.verify import randomise_

SIZE = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}


def make(name, exits=3, **kwargs):
    torch.manual_seed(0)
    net = zc.add_exits(timm.create_model(name, num_classes=10, **SIZE, **kwargs), exits).eval().requires_grad_(False)
    randomise_(net, torch.Generator().manual_seed(0))
    return net


@pytest.fixture(scope="module")
def net():
    return make("test_resnet")


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.randn(9, 3, 64, 64) * torch.linspace(0.2, 3, 9)[:, None, None, None]


def every(net, x):
    with net.every_output(), torch.no_grad():
        return net(x)


def spread(net, images, confidence="max_softmax"):
    """Thresholds by which some samples leave at each exit, none of them near one."""
    there, thresholds = list(range(len(images))), []
    for logits in every(net, images)[:-1]:
        sure = MEASURES[confidence](logits)
        ordered = sure[there].sort(descending=True).values
        thresholds.append(float(ordered[1:3].mean()))
        there = [i for i in there if sure[i] < thresholds[-1]]
    return thresholds


def calls(net):
    """Names of the modules that run, in order."""
    seen = []
    for path, module in net.named_modules():
        module.register_forward_pre_hook(lambda module, args, path=path: seen.append((path, len(args[0]) if args else 0)))
    return seen


def test_it_stays_the_model_it_was(net, images):
    base = timm.create_model("test_resnet", num_classes=10, **SIZE).eval()
    heads = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("exits.")}
    base.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if name not in heads})
    assert isinstance(net, type(base))
    assert len(heads) == 3 * 4
    assert torch.equal(net(images), base(images))
    assert torch.equal(net.forward_features(images), base.forward_features(images))
    assert net.num_classes == 10
    assert net.feature_info == base.feature_info


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_heads_of_maps_read_the_means_of_their_parts(name):
    size = {"img_size": 64, "window_size": 4} if name.startswith("swin") else {}
    net, images = make(name, 2, **size), torch.randn(2, 3, 64, 64)
    seen = {}
    for exit in net.record.places:
        net.get_submodule(exit.place).register_forward_hook(lambda module, args, out, place=exit.place: seen.update({place: out}))
    logits = every(net, images)
    assert {exit.grid for exit in net.record.places} == {4}
    for exit, head, found in zip(net.record.places, net.exits, logits, strict=False):
        maps = seen[exit.place] if exit.format == "NHWC" else seen[exit.place].permute(0, 2, 3, 1)
        step = maps.shape[1] // 4
        assert maps.shape[1] == maps.shape[2] == 4 * step
        means = [maps[:, step * i : step * (i + 1), step * j : step * (j + 1)].mean((1, 2)) for i in range(4) for j in range(4)]
        normed = [F.layer_norm(mean, mean.shape[1:], head.norm.weight, head.norm.bias) for mean in means]
        torch.testing.assert_close(F.linear(torch.cat(normed, 1), head.fc.weight, head.fc.bias), found, rtol=1e-4, atol=1e-4)


def test_train_mode_gives_all_logits_and_eval_mode_runs_no_head(net, images):
    net = copy.deepcopy(net)
    seen = calls(net)
    net(images)
    assert not any(path.startswith("exits") for path, _ in seen)
    outs = net.train()(images)
    assert [out.shape for out in outs] == [(9, 10)] * 4


def test_gradients_reach_the_trunk_from_each_exit_alone(images):
    net = make("test_resnet").requires_grad_(True).train()
    for i, place in enumerate(["conv1.3", "layer1", "layer2"]):
        net.zero_grad()
        F.cross_entropy(net(images)[i], torch.arange(9)).backward()
        assert net.exits[i].fc.weight.grad.abs().sum() > 0
        assert net.conv1[0].weight.grad.abs().sum() > 0, place
        assert net.fc.weight.grad is None


def test_gradient_checkpointing_changes_no_gradient(images):
    found = []
    for enable in (False, True):
        torch.manual_seed(0)
        net = make("test_vit", drop_path_rate=0.0).requires_grad_(True).train()
        net.set_grad_checkpointing(enable)
        sum(F.cross_entropy(out, torch.arange(9)) for out in net(images)).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("name", "confidence"),
    [*(("test_resnet", c) for c in MEASURES), ("test_vit", "entropy"), ("test_mambaout", "margin"), ("test_efficientnet", "max_softmax")],
)
def test_samples_that_leave_get_the_logits_they_get_alone(name, confidence, images):
    net = make(name)
    thresholds = spread(net, images, confidence)
    found, left = net.infer(images, threshold=thresholds, confidence=confidence, return_exits=True)
    assert set(left.tolist()) == {0, 1, 2, 3}
    outs = every(net, images)
    torch.testing.assert_close(found, torch.stack([outs[exit][i] for i, exit in enumerate(left)]), rtol=1e-4, atol=1e-4)
    alone = torch.cat([net.infer(image[None], threshold=thresholds, confidence=confidence) for image in images])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_a_large_batch_keeps_its_order(net, images):
    thresholds = spread(net, images)
    many = images[torch.randint(9, (256,), generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(
        net.infer(many, threshold=thresholds),
        torch.cat([net.infer(part, threshold=thresholds) for part in many.split(100)]),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_batch_shrinks_and_then_nothing_runs(net, images):
    net = copy.deepcopy(net)
    thresholds = spread(net, images)
    _, left = net.infer(images, threshold=thresholds, return_exits=True)
    seen = calls(net)
    net.infer(images, threshold=thresholds)
    there = dict(seen)
    assert there["conv1"] == 9
    assert there["layer4"] == int((left == 3).sum())
    first = images[left == 0]
    seen.clear()
    net.infer(first, threshold=thresholds)
    place = net.record.places[0].place
    assert place in dict(seen)
    assert "layer4" not in dict(seen)
    assert "exits.1" not in dict(seen)


def test_a_fixed_exit_runs_one_head_and_nothing_later(net, images):
    net = copy.deepcopy(net)
    outs = every(net, images)
    seen = calls(net)
    assert torch.equal(net.infer(images, exit=1), outs[1])
    assert [path for path, _ in seen if path.startswith("exits.") and path.count(".") == 1] == ["exits.1"]
    assert "layer3" not in dict(seen)
    assert torch.equal(net.infer(images, exit=3), outs[3])


def test_thresholds_of_one_exit_or_none(net, images):
    outs = every(net, images)
    assert torch.equal(net.infer(images, threshold=[None, 0.0, None]), outs[1])
    assert torch.equal(net.infer(images, threshold=[None, None, None]), outs[3])
    assert torch.equal(net.infer(images, threshold=0.0), outs[0])


def test_patience_waits_for_exits_that_agree(net, images):
    outs = every(net, images)
    found, left = net.infer(images, patience=2, return_exits=True)
    for i in range(9):
        said = [int(out[i].argmax()) for out in outs]
        expected = next((k for k in range(1, 3) if said[k] == said[k - 1]), 3)
        assert left[i] == expected
        torch.testing.assert_close(found[i], outs[expected][i], rtol=1e-4, atol=1e-4)


def test_images_modes_and_batch_statistics_are_left_alone(net, images):
    net = copy.deepcopy(net).train()
    net.layer1.eval()
    state, before = copy.deepcopy(net.state_dict()), images.clone()
    expected = copy.deepcopy(net).eval().infer(images, threshold=0.5)
    assert torch.equal(net.infer(images, threshold=0.5), expected)
    assert net.training
    assert not net.layer1.training
    assert torch.equal(images, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_threads_do_not_disturb_each_other(net, images):
    thresholds = spread(net, images)
    expected = [net.infer(images[i:], threshold=thresholds) for i in range(4)]
    wrong = []

    def work(i):
        for _ in range(5):
            if not torch.equal(net.infer(images[i:], threshold=thresholds), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_costs_are_the_layouts_macs(net):
    layout = zc.analyze(net)
    assert net.costs()[-1] == layout.macs()
    assert list(net.costs()) == sorted(net.costs())
    for exit in range(3):
        # The other heads on the way are paid for too.
        on_the_way = sum(head.fc.weight.numel() for head in net.exits[:exit])
        assert net.costs()[exit] == zc.analyze(net.export(exit)).macs() + on_the_way


def test_layout_prune_and_proofs(net, images):
    layout = zc.analyze(net)
    for i in range(3):
        assert str(layout.params[f"exits.{i}.fc.weight"][1]) == f"16 {layout.params[f'exits.{i}.norm.weight'][0]}"
        assert not layout.axes[layout.params[f"exits.{i}.norm.weight"][0]].frozen
    assert zc.verify(net, layout).permutation_error < 1e-9
    small = zc.prune(net, macs=0.5, layout=layout)
    assert abs(small.costs()[-1] / net.costs()[-1] - 0.5) < 0.02
    thresholds = spread(small, images)
    found, left = small.infer(images, threshold=thresholds, return_exits=True)
    assert len(set(left.tolist())) == 4
    outs = every(small, images)
    torch.testing.assert_close(found, torch.stack([outs[exit][i] for i, exit in enumerate(left)]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [0.5, 0.8])
def test_calibrate_meets_its_budget_and_stores_it(net, images, budget):
    net = copy.deepcopy(net)
    loader = [(torch.randn(50, 3, 64, 64) * torch.rand(50, 1, 1, 1), torch.zeros(50)) for _ in range(2)]
    found = net.calibrate(loader, budget)
    costs = net.costs()
    base = costs[-1] - sum(head.fc.weight.numel() for head in net.exits)
    left = torch.cat([net.infer(x, return_exits=True)[1] for x, _ in loader])
    spent = sum(costs[exit] for exit in left.tolist()) / 100
    assert spent == pytest.approx(found.macs, rel=0.02)
    assert spent / base == pytest.approx(budget, abs=0.03)
    assert net.record.thresholds == found.thresholds
    assert net._model_args["variant"]["exits"]["thresholds"] == list(found.thresholds)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_export_is_static_small_and_equal(name, images):
    net = make(name)
    outs = every(net, images)
    for exit in range(3):
        short = net.export(exit)
        assert torch.equal(short(images), outs[exit])
        assert sum(p.numel() for p in short.parameters()) < sum(p.numel() for p in net.parameters())
        assert not set(short.state_dict()) - set(net.state_dict()) - set(short.exits.state_dict(prefix="exits."))
        torch.testing.assert_close(short.forward_head(short.forward_features(images)), outs[exit])
        assert short.train()(images).shape == (9, 10)
        assert all(p.grad is None for p in short.parameters())
    expected = short.eval()(images)  # train mode has changed statistics
    assert torch.equal(torch.jit.trace(short, images)(images), expected)


def test_export_can_be_captured_whole(net, images):
    short = net.export(1)
    program = torch.export.export(short, (images,), strict=True)
    torch.testing.assert_close(program.module()(images), short(images))


def test_reset_classifier_renews_every_head(images):
    net = make("test_resnet")
    net.reset_classifier(7)
    assert [out.shape[1] for out in every(net, images)] == [7] * 4
    short = net.export(0)
    short.reset_classifier(3)
    assert short(images).shape == (9, 3)
    net.reset_classifier(0)
    assert [out.shape[1] for out in every(net, images)[:-1]] == [16 * exit.features for exit in net.record.places]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "found none"),
        ({"exit": 4}, "exit: expected 0 to 3"),
        ({"exit": -1}, "exit: expected 0 to 3"),
        ({"exit": True}, "exit: expected"),
        ({"exit": 1, "threshold": 0.5}, "one of exit, threshold and patience"),
        ({"threshold": 1.5}, r"0…1, found 1.5"),
        ({"threshold": -0.1}, r"0…1"),
        ({"threshold": float("nan")}, r"0…1"),
        ({"threshold": [0.5]}, "3 of them"),
        ({"threshold": "high"}, "found 'high'"),
        ({"threshold": 0.5, "confidence": "trust"}, "max_softmax, entropy, margin"),
        ({"patience": 1}, "patience: expected 2 to 3"),
        ({"patience": 9}, "patience: expected 2 to 3"),
        ({"patience": 2, "confidence": "margin"}, "found patience"),
    ],
)
def test_infer_refuses(net, images, arguments, said):
    with pytest.raises(CompressError, match=said):
        net.infer(images, **arguments)


def test_infer_refuses_what_is_no_batch(net):
    with pytest.raises(CompressError, match="at least one image"):
        net.infer(torch.zeros(0, 3, 64, 64), threshold=0.5)
    with pytest.raises(CompressError, match="found str"):
        net.infer("images", threshold=0.5)


@pytest.mark.parametrize("budget", [0.001, 1.9, 0, -1, True, "half", float("nan")])
def test_calibrate_refuses_a_budget_no_threshold_reaches(net, images, budget):
    before = net.record
    with pytest.raises(CompressError, match="budget"):
        net.calibrate([images], budget)
    assert net.record is before


def test_calibrate_refuses_what_are_no_images(net):
    for loader in ([], [("a",)], [torch.zeros(3, 4, dtype=torch.int64)]):
        with pytest.raises(CompressError, match="calibrate: expected"):
            net.calibrate(loader, 0.5)


def test_export_refuses(net):
    for exit in (3, -1, "last", None):
        with pytest.raises(CompressError, match="expected 0 to 2"):
            net.export(exit)
    short = net.export(0)
    for call in (lambda: short.export(0), lambda: short.infer(torch.zeros(1, 3, 64, 64)), lambda: short.calibrate([], 0.5)):
        with pytest.raises(CompressError, match="exported"):
            call()

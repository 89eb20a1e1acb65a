"""Users' hooks see nothing of an analysis, stay where they are, and are not overlooked where they change what a model computes."""

import copy
import threading

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune as masks

import zoo_compress as zc

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
seen_globally = []
CALLS = {
    "analyze": zc.analyze,
    "prune": lambda m: zc.prune(m, macs=0.6, reconstruct=[IMAGES], criterion="thinet"),
    "verify": lambda m: zc.verify(m, zc.analyze(m)),
    "sparsify": lambda m: zc.sparsify(m, density=0.5),
    "cluster": lambda m: zc.cluster(m, bits=2),
    "factorize": lambda m: zc.factorize(m, macs=0.8),
    "reinitialize": zc.reinitialize,
    "residual_blocks": zc.residual_blocks,
    "calibrate": lambda m: zc.calibrate(m, [IMAGES]),
    "measure": lambda m: zc.measure(m, runs=1, warmup=1),
    "slim": lambda m: zc.slim(m, widths=(0.5, 1.0)),
    "add_exits": lambda m: zc.add_exits(m, 1),
}


class Collector:
    """As users write them: holds the model, and what it saw."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def hook(self, module, args, output):
        self.seen.append(output.mean().item())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10).eval()


@pytest.mark.parametrize("name", [*CALLS, "save"])
def test_hooks_see_nothing_and_stay(name, model, tmp_path):
    seen, collector = [], Collector(model)

    def backward(module, inputs, outputs):
        seen.append(outputs)

    handles = [
        model.layer1.register_forward_hook(lambda module, args, output: seen.append(output)),
        model.layer2.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True),
        model.layer3.register_forward_hook(collector.hook),
        model.fc.register_forward_hook(lambda module, args, output: seen_globally.append(output)),
        model.layer4.register_full_backward_hook(backward),
        model.register_state_dict_post_hook(lambda module, state, prefix, metadata: seen.append(prefix)),
    ]
    seen_globally.clear()
    call = CALLS.get(name, lambda m: zc.save(m, tmp_path / "out"))
    call(model)
    assert not seen
    assert not seen_globally
    assert not collector.seen
    if name != "slim":
        model(IMAGES).sum().backward()
        assert (len(seen), len(seen_globally), len(collector.seen)) == (3, 1, 1)
    for handle in handles:
        handle.remove()


def test_a_model_that_comes_out_has_the_hooks(model):
    seen = []
    model.layer1.register_forward_hook(lambda module, args, kwargs, output: seen.append((len(args), kwargs)), with_kwargs=True)
    small = zc.prune(model, macs=0.6)
    assert not seen
    small(IMAGES)
    assert seen == [(1, {})]


@pytest.mark.parametrize("name", [*CALLS, "save"])
@pytest.mark.parametrize("kind", ["scales", "in place", "input"])
def test_hooks_that_change_the_model_are_refused(name, kind, model, tmp_path):
    if kind == "scales":
        model.layer2.register_forward_hook(lambda module, args, output: output * output.abs().max().item())
    elif kind == "in place":
        model.layer2.register_forward_hook(lambda module, args, output: _halve(output))
    else:
        model.layer2.register_forward_pre_hook(lambda module, args: (args[0].clamp(max=0.1),))
    model.layer1.register_forward_hook(lambda module, args, output: None)
    call = CALLS.get(name, lambda m: zc.save(m, tmp_path / "out"))
    with pytest.raises(zc.CompressError, match=r"^layer2: a forward hook .*lambda.* changes what the model computes.* Remove it") as error:
        call(model)
    assert "\n" not in str(error.value)
    assert len(model.layer2._forward_hooks) + len(model.layer2._forward_pre_hooks) == 1


def _halve(output):
    output.mul_(0.5)


def test_a_hook_that_fails_is_refused(model):
    def hook(module, args, output):
        raise RuntimeError("enough")

    model.layer2.register_forward_hook(hook)
    with pytest.raises(zc.CompressError, match=r"layer2: a forward hook .* fails \(RuntimeError: enough\)"):
        zc.prune(model, macs=0.6)


def test_hooks_that_hold_what_cannot_be_copied_are_said_to_be_left_out(model, caplog):
    lock, seen = threading.Lock(), []

    def hook(module, args, output):
        with lock:
            seen.append(output)

    model.layer2.register_forward_hook(hook)
    small = zc.prune(model, macs=0.6)
    assert not seen
    assert "left out of what is looked at" in caplog.text
    small(IMAGES)
    assert len(seen) == 1


def test_what_torch_registers_is_part_of_the_model(model):
    """Masks are applied by a hook: without it the weight would be that of the last call."""
    masks.l1_unstructured(model.fc, "weight", amount=0.5)
    with torch.no_grad():
        model.fc.weight_orig.mul_(3)
        expected = model(IMAGES)
        zc.calibrate(copy.deepcopy(model), [IMAGES])
        model.fc.weight = torch.zeros_like(model.fc.weight)
        assert torch.equal(model(IMAGES), expected)
    assert len(model.fc._forward_pre_hooks) == 1


def test_early_exits_still_leave_while_a_user_looks_on(model, tmp_path):
    net, seen = zc.add_exits(model, 1).eval(), []
    net.layer1.register_forward_hook(lambda module, args, output: seen.append(output))
    zc.save(net, tmp_path)
    assert not seen
    assert zc.measure(net, runs=1, warmup=1).macs
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(IMAGES), net(IMAGES))
    assert len(seen) == 1


class Remembers(nn.Module):
    """A model that computes by hooks of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(32, 10)
        self.a.register_forward_hook(self.remember)

    def remember(self, module, args, output):
        self.kept = output.mean((2, 3))

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu().mean((2, 3))
        return self.head(torch.cat([x, self.kept], 1))


class Closes(Remembers):
    """The same by a function, whose copies reach the first model."""

    def __init__(self):
        super().__init__()
        self.a._forward_hooks.clear()

        def remember(module, args, output):
            self.kept = output.mean((2, 3))

        self.a.register_forward_hook(remember)


def test_a_models_own_hooks_run_in_copies():
    model = Remembers().eval()
    layout = zc.analyze(model, IMAGES)
    zc.verify(model, layout, IMAGES)
    small = zc.prune(model, macs=0.6, layout=layout)
    assert small.eval()(IMAGES).shape == (4, 10)
    assert small.head.in_features < 32


def test_a_closure_that_the_model_needs_is_refused():
    with pytest.raises(zc.CompressError, match=r"a: a forward hook .*remember"):
        zc.analyze(Closes().eval(), IMAGES)


def test_features_collected_by_hooks_of_timms_are_pruned():
    model = timm.create_model("test_resnet", features_only=True, feature_cls="hook").eval()
    small = zc.prune(model, macs=0.6)
    with torch.no_grad():
        assert [m.shape[1] for m in small(IMAGES)] == small.feature_info.channels()


# What profilers leave behind


def counters(model):
    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.ones(1, dtype=torch.float64))


def numbers(model):
    for module in model.modules():
        module.__flops__, module.__params__, module.__batch_counter__ = 12345, 77, 2
        module.accumulate_flops = (lambda self: 0).__get__(module)


@pytest.mark.parametrize("leave", [counters, numbers])
@pytest.mark.parametrize("name", CALLS)
def test_leftovers_of_profilers_do_no_harm(leave, name, model):
    leave(model)
    CALLS[name](model)


@pytest.mark.parametrize("leave", [counters, numbers])
@pytest.mark.parametrize("compress", [lambda m: m, lambda m: zc.prune(m, macs=0.6)])
def test_leftovers_of_profilers_are_not_saved(leave, compress, model, tmp_path):
    leave(model)
    small = compress(model)
    zc.save(small, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(IMAGES), small(IMAGES))

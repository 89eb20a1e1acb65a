"""Choosing widths by measurement, on a machine whose times are known: a clock that only layers move."""

import numpy as np
import pytest
import torch
from tqdm import tqdm

import zoo_compress as zc
from zoo_compress.profiling import latency, search
from zoo_compress.profiling.fit import fit_latency
from zoo_compress.structure.widths import groups


def seconds(model, clock):
    """Duration of one pass by the clock of these tests."""
    before = clock()
    model(torch.zeros(1, *model.pretrained_cfg["input_size"]))
    return clock() - before


def smooth(layer):
    out, weights = layer.weight.shape[0], layer.weight.numel()
    return 1e-4 + 3e-8 * weights + 2e-6 * out


def vectors_of_16(layer):
    """Hardware that rounds channels up to multiples of 16."""
    out, inputs = (-(-n // 16) * 16 for n in layer.weight.shape[:2])
    return 1e-6 * out * inputs


def test_latency_is_a_polynomial(model, layout, clock, layers_take_time):
    layers_take_time(smooth)
    image = torch.zeros(2, *model.default_cfg["input_size"])
    with latency.inference([model]), tqdm(disable=True) as progress:
        found = fit_latency(model, layout, groups(layout), image, seconds=0.0, progress=progress)
    generator = np.random.default_rng(1)
    for _ in range(3):
        widths = {name: int(generator.integers(1, layout.axes[name].size + 1)) for group in groups(layout) for name in group.axes}
        small = zc.resize(model, layout, widths)
        assert found(layout.sizes(widths)) / 1e9 == pytest.approx(seconds(small, clock), rel=1e-3)


@pytest.mark.parametrize("duration", [smooth, vectors_of_16], ids=lambda f: f.__name__)
@pytest.mark.parametrize("target", [0.4, 0.7])
def test_a_latency_is_met(model, layout, clock, layers_take_time, duration, target):
    layers_take_time(duration)
    small = zc.prune(model, latency=target, layout=layout)
    assert abs(seconds(small, clock) / seconds(model, clock) - target) <= search.LATENCY_TOLERANCE
    zc.verify(small, zc.analyze(small))


def test_milliseconds(model, layout, clock, layers_take_time):
    layers_take_time(lambda layer: 100 * smooth(layer))
    dense = seconds(model, clock)
    small = zc.prune(model, latency=0.6 * dense * 1e3, layout=layout)
    assert abs(seconds(small, clock) / dense - 0.6) <= search.LATENCY_TOLERANCE


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.5}, {"keep": 0.6}, {"macs": 0.5, "scope": "local"}])
def test_auto_is_fastest_within_the_budget(model, layout, clock, layers_take_time, budget):
    layers_take_time(vectors_of_16)
    auto = zc.prune(model, **budget, round_to="auto", layout=layout)
    others = [zc.prune(model, **budget, round_to=multiple, layout=layout) for multiple in (1, 8, 16)]
    assert seconds(auto, clock) <= min(seconds(other, clock) for other in others)
    if "macs" in budget:
        assert abs(zc.analyze(auto).macs() / layout.macs() - 0.5) <= 0.02


def test_slow_layers_give_more(model, layout, clock, layers_take_time):
    """One layer takes long for what it computes: its own channels go first."""
    slow = model.layer3[0].conv1
    size, kernel = slow.weight.shape[0], slow.weight.shape[2:]

    def duration(layer):
        return 1e-7 * layer.weight.numel() * (50 if getattr(layer, "slow", False) else 1)

    layers_take_time(duration)
    slow.slow = True
    try:
        blind, aware = (zc.prune(model, macs=0.6, round_to=r, layout=layout).layer3[0].conv1.out_channels for r in (8, "auto"))
    finally:
        del slow.slow
    assert aware < blind <= size, kernel


def test_same_times_same_choice(model, layout, clock, layers_take_time):
    layers_take_time(smooth)
    first, second = (zc.prune(model, latency=0.5, round_to="auto", layout=layout).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_model_is_left_alone(model, layout, clock, layers_take_time):
    layers_take_time(smooth)
    before, threads = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_num_threads()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    model.train()
    zc.prune(model, latency=0.7, layout=layout, threads=threads + 1)
    assert model.training
    model.eval()
    assert torch.get_num_threads() == threads
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_nothing_is_measured_without_need(model, layout, monkeypatch):
    monkeypatch.setattr("zoo_compress.methods.prune.search", None)
    zc.prune(model, macs=0.5, layout=layout)


def test_a_latency_out_of_reach(model, layout, clock, layers_take_time):
    layers_take_time(lambda layer: 1.0)  # whatever its width
    with pytest.raises(zc.WidthError, match=r"cannot keep 50.0% of latency: the least reachable .* is 100.0%"):
        zc.prune(model, latency=0.5, layout=layout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latency": 0.5, "macs": 0.5}, "exactly one of .* found macs, latency"),
        ({"latency": 0}, "latency is a fraction"),
        ({"latency": 1e9}, "more than the model takes here"),
        ({"latency": 0.5, "batch_size": 0}, "expected batch_size of at least 1, found 0"),
        ({"latency": 0.5, "threads": 0}, "expected 1 to 1024 threads, found 0"),
        ({"macs": 0.5, "round_to": "automatic"}, "positive integer or 'auto', found 'automatic'"),
        ({"latency": 0.5, "criterion": "bn_scale", "exclude": "*"}, "ranks no axis"),
    ],
)
def test_bad_requests(model, layout, clock, layers_take_time, arguments, message):
    layers_take_time(smooth)
    with pytest.raises(zc.CompressError, match=message):
        zc.prune(model, layout=layout, **arguments)

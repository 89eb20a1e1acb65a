"""Settings that keep to a time limit: what is measured, which is picked, what is refused."""

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.profiling.measure import measure_many
from zoo_compress.profiling.settings import ways

SIZE = {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}


def make(exits=2, widths=None):
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10, **SIZE)
    net = zc.add_exits(net, exits) if exits else net
    return (zc.slim(net, widths) if widths else net).eval()


@pytest.fixture
def ticking(layers_take_time):
    """A layer takes a microsecond for each of its output channels."""
    layers_take_time(lambda layer: layer.weight.shape[0] / 1e6)


def elapsed(net, clock, values):
    net.use(values)
    start = clock.now
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    return 1e3 * (clock.now - start)


@pytest.mark.parametrize(
    ("exits", "widths", "knobs"),
    [(2, None, ("exit",)), (0, (0.5, 1.0), ("width",)), (2, (0.5, 1.0), ("width", "exit"))],
)
def test_the_costliest_within_the_limit_is_chosen(clock, ticking, exits, widths, knobs):
    net = make(exits, widths)
    everything = net.fit(1e9, runs=1)
    assert tuple(everything.best.values) == knobs
    assert len(everything.measured) == (3 if exits else 1) * (2 if widths else 1)
    assert everything.best.macs == max(setting.macs for setting in everything.measured)
    for setting in everything.measured:
        assert elapsed(net, clock, setting.values) == pytest.approx(setting.latency_ms)
    times = sorted(setting.latency_ms for setting in everything.measured)
    limit = (times[-1] + times[-2]) / 2
    found = net.fit(limit, runs=1)
    inside = [setting for setting in found.measured if setting.latency_ms <= limit]
    assert found.macs == max(setting.macs for setting in inside)
    assert found.latency_ms <= limit
    assert (found.width, found.exit) == (found.best.values.get("width"), found.best.values.get("exit"))
    # The network runs there now.
    start = clock.now
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    assert 1e3 * (clock.now - start) == pytest.approx(found.latency_ms)
    assert "best" in str(found)


def test_accuracies_decide_where_they_are_given(ticking, clock):
    net = make(2)
    assert net.fit(1e9, runs=1, accuracies={0: 90.0, 1: 95.0, 2: 94.0}).exit == 1
    assert net.chosen_exit == 1
    assert net.fit(1e9, runs=1, accuracies={0: 90.0, 2: 90.0}).exit == 0, "the faster of equal ones"
    both = make(2, (0.5, 1.0))
    assert both.fit(1e9, runs=1, accuracies={(0.5, 2): 80.0, (1.0, 0): 70.0}).best.values == {"width": 0.5, "exit": 2}


def test_a_limit_that_nothing_keeps_leaves_the_network_as_it_was(ticking, clock):
    net = make(2, (0.5, 1.0))
    net.set_width(0.5)
    net.set_exit(1)
    sizes = net.sizes
    with pytest.raises(CompressError, match=r"nothing keeps to 0.001 ms here: the fastest, width 0.5, exit 0, takes 0.\d+ ms"):
        net.fit(0.001, runs=1)
    assert net.sizes == sizes
    assert net.chosen_exit == 1


def test_pairs_run_as_before_after_fitting(clock, ticking):
    """Copies that are kept at the chosen width are made anew when the bank changes."""
    net, x = make(2, (0.5, 1.0)).requires_grad_(False), torch.randn(2, 3, 32, 32)
    net.fit(1e9, runs=1)
    net.use({"width": 0.5, "exit": 1})
    before = net(x)
    assert torch.equal(net(x), net.export(0.5, exit=1)(x))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(net(x), before)
    assert torch.equal(net(x), net.export(0.5, exit=1)(x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"latency_ms": 0}, "milliseconds above 0"),
        ({"latency_ms": float("nan")}, "milliseconds above 0"),
        ({"latency_ms": "5"}, "milliseconds above 0"),
        ({"latency_ms": 5, "runs": 0}, "runs of at least 1"),
        ({"latency_ms": 5, "batch_size": True}, "batch_size of at least 1"),
        ({"latency_ms": 5, "threads": 0}, "expected 1 to 1024 threads, found 0"),
        ({"latency_ms": 5, "accuracies": {}}, "expected accuracies as exit"),
        ({"latency_ms": 5, "accuracies": {7: 1.0}}, "expected exit of the network, found 7"),
        ({"latency_ms": 5, "accuracies": {0: float("nan")}}, "expected a number"),
    ],
)
def test_fit_refuses(arguments, said):
    with pytest.raises(CompressError, match=said):
        make(2).fit(**arguments)


def test_a_network_that_runs_in_one_way_has_nothing_to_fit():
    with pytest.raises(CompressError, match="runs in one way"):
        make(2).export(0).fit(5)


def test_every_way_is_a_model_of_its_own():
    x = torch.randn(4, 3, 32, 32)
    net = make(2, (0.5, 1.0))
    net.calibrate([x], 0.7)
    found = ways(net)
    assert list(found) == [
        *("×1", "×1 exit 0", "×1 exit 1", "×1 thresholds"),
        *("×0.5", "×0.5 exit 0", "×0.5 exit 1", "×0.5 thresholds"),
    ]
    with torch.no_grad():
        for label, model in found.items():
            net.set_width(float(label.split()[0][1:]))
            exit = int(label[-1]) if "exit" in label else None if "thresholds" in label else 2
            assert torch.equal(model.eval()(x), net.infer(x, exit=exit)), label
    assert ways(nn.Identity()).keys() == {""}


def test_what_samples_cost_that_leave(clock, ticking):
    x = torch.randn(6, 3, 32, 32) * torch.linspace(0.1, 3, 6)[:, None, None, None]
    net = make(2)
    net.calibrate([x], 0.7)
    model = ways(net)["thresholds"].eval()
    with pytest.raises(CompressError, match="expected to have seen some"):
        measure_many({"model": model}, runs=2)
    with torch.no_grad():
        model(x)
    left = net.infer(x, return_exits=True)[1].tolist()
    costs = net.costs()
    assert len(set(left)) > 1
    cost = measure_many({"model": model}, batch_size=1, runs=2, warmup=1)["model"]
    assert cost.macs == round(sum(costs[exit] for exit in left) / 6)
    assert model.fractions == pytest.approx([left.count(exit) / 6 for exit in range(3)])
    # Alone, each takes what its exit takes, and the heads on the way.
    start = clock.now
    for image in x:
        net.infer(image[None])
    assert cost.latency_ms == pytest.approx(1e3 * (clock.now - start) / 6)
    assert [len(batch) for batch in model.batches(4)] == [4, 4]


def test_widths_without_statistics_are_no_setting():
    torch.manual_seed(0)
    net = zc.slim(timm.create_model("test_resnet", num_classes=10, **SIZE), (0.25, 1.0), universal=True).eval()
    assert net.knobs() == {"width": (1.0,)}
    zc.calibrate(net, 0.3, [torch.randn(4, 3, 32, 32)])
    assert net.knobs() == {"width": (0.3, 1.0)}
    net.set_widths(net.groups[0].at(net.groups[0].steps // 2))
    sizes = net.sizes  # no fraction says them
    with pytest.raises(CompressError, match="nothing keeps"):
        net.fit(1e-9, runs=1)
    assert net.sizes == sizes

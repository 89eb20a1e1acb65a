"""Measuring: counts are right, times are the model's own, nothing is left changed."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo_compress as zc
from zoo_compress.profiling.latency import inference, interleaved, ratio
from zoo_compress.profiling.measure import measure_many
from zoo_compress.profiling.memory import activation_memory, weight_memory


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()


def test_counts_agree_with_torch(model):
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, *model.default_cfg["input_size"][1:]))
    cost = zc.measure(model, runs=3, warmup=1)
    assert cost.macs == counter.get_total_flops() / 2
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.weight_memory == sum(t.nbytes for t in model.state_dict().values())
    assert cost.peak_memory == cost.weight_memory + cost.activation_memory
    assert cost.latency_ms > 0
    assert cost.batch_size == 1


def test_times_are_medians_of_interleaved_runs(clock, layers_take_time):
    order = []
    durations = {1: iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0]), 2: iter([9.0, 9.0, 10.0, 10.0, 30.0, 30.0, 20.0])}

    def duration(layer):
        order.append(layer.out_features)
        return next(durations[layer.out_features]) / 1e3

    models = {"a": nn.Linear(4, 1), "b": nn.Linear(4, 2)}
    for m in models.values():
        m.pretrained_cfg = {"input_size": (3, 4, 4)}
    layers_take_time(duration)
    with inference(models.values()):
        times = interleaved(models, dict.fromkeys(models, torch.zeros(1, 4)), runs=5, warmup=2)
    assert order == [1, 1, 2, 2] + [1, 2] * 5
    assert times["a"].tolist() == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3])
    assert ratio(times["b"], times["a"])[0] == pytest.approx(7.5)  # of 10, 5, 10, 7.5, 4


def test_latency_is_the_median(model, clock, layers_take_time):
    head = iter([0, 0, 0, 1e-3, 50e-3, 2e-3])  # the passes: analysis, memory, one to warm up, three timed
    layers_take_time(lambda layer: next(head) if isinstance(layer, nn.Linear) else 0)
    cost = measure_many({"m": model}, runs=3, warmup=1)["m"]
    assert cost.latency_ms == pytest.approx(2)
    assert cost.latency_iqr_ms == pytest.approx(24.5)


class Branches(nn.Module):
    """Peaks where both branches are alive: 100 floats in, 1,000 and 3,000 beside it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(100, 1000), nn.Linear(100, 3000)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        x = a.sum() + b.sum()
        del a, b
        return x.expand(5).reshape(5) + torch.zeros(2000)[:5]


def test_memory_is_that_of_the_tensors_alive(model):
    branches = Branches()
    # A view takes nothing; at the two sums (one float each, and their sum) both branches live.
    assert activation_memory(branches, torch.zeros(1, 100)) == 4 * (100 + 1000 + 3000 + 3)
    assert weight_memory(branches) == 4 * (101 * 1000 + 101 * 3000)
    one, two = (zc.measure(model, batch_size=n, runs=1, warmup=1) for n in (1, 2))
    assert two.activation_memory == 2 * one.activation_memory
    assert two.weight_memory == one.weight_memory


def test_shared_weights_count_once():
    shared = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    shared[1].weight = shared[0].weight
    assert weight_memory(shared) == 4 * 64


def test_threads_and_modes_are_given_back(model):
    before = torch.get_num_threads()
    model.train()
    model.bn1.eval()
    cost = zc.measure(model, batch_size=2, threads=2, runs=1, warmup=1)
    assert (cost.threads, cost.batch_size) == (2, 2)
    assert model.training
    assert not model.bn1.training
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size of at least 1, found 0"),
        ({"batch_size": True}, "batch_size of at least 1, found True"),
        ({"batch_size": 10**10}, "batch_size of at most 65536, found 10000000000"),
        ({"runs": 0}, "runs of at least 1, found 0"),
        ({"runs": 1.5}, r"runs of at least 1, found 1\.5"),
        ({"warmup": 0}, "warmup of at least 1, found 0"),
        ({"threads": -1}, "expected 1 to 1024 threads, found -1"),
        ({"threads": 100_000}, "expected 1 to 1024 threads, found 100000"),
    ],
)
def test_numbers_out_of_range(model, wrong, message):
    with pytest.raises(zc.CompressError, match=message):
        zc.measure(model, **wrong)


def test_other_devices_are_refused():
    with pytest.raises(zc.CompressError, match="expected a model on the CPU"):
        zc.measure(timm.create_model("test_resnet", device="meta"))


def test_a_compiled_model_is_measured_as_it_runs():
    model = timm.create_model("test_resnet")
    found = zc.measure(torch.compile(model, backend="eager"), runs=1, warmup=1)
    assert (found.macs, found.params) == (zc.analyze(model).macs(), sum(p.numel() for p in model.parameters()))

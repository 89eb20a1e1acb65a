"""Measuring: counts are right, times are the model's own, nothing is left changed."""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo_compress.errors import CompressError
from zoo_compress.training import measure as module
from zoo_compress.training.measure import measure, measure_many


class Sleeper(nn.Module):
    """Takes a known time."""

    def __init__(self, ms):
        super().__init__()
        self.ms = ms
        self.pretrained_cfg = {"input_size": (1, 4, 4)}

    def forward(self, x):
        time.sleep(self.ms / 1e3)
        return x


def test_counts_agree_with_torch(make_model):
    model = make_model()
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 1, 16, 16))
    cost = measure(model, runs=3, warmup=1)
    assert cost.macs == counter.get_total_flops() / 2
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.latency_ms > 0
    assert cost.batch_size == 1


def test_times_are_medians_of_interleaved_runs(monkeypatch):
    class NoLayout:
        @staticmethod
        def macs():
            return 0

    monkeypatch.setattr(module, "analyze", lambda model: NoLayout)
    calls = []
    models = {"slow": Sleeper(12), "fast": Sleeper(4)}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: calls.append(name))
    costs = measure_many(models, runs=9, warmup=1)
    assert calls[2:] == ["slow", "fast"] * 9
    assert costs["slow"].latency_ms == pytest.approx(12, abs=4)
    assert costs["fast"].latency_ms == pytest.approx(4, abs=3)
    assert list(costs) == ["slow", "fast"]


def test_threads_and_modes_are_given_back(make_model):
    model, before = make_model().train(), torch.get_num_threads()
    cost = measure(model, batch_size=2, threads=2, runs=1, warmup=1)
    assert (cost.threads, cost.batch_size) == (2, 2)
    assert model.training
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"runs": 0}, {"threads": -1}, {"warmup": 0}])
def test_numbers_below_one(make_model, wrong):
    with pytest.raises(CompressError, match=f"{next(iter(wrong))} of at least 1"):
        measure(make_model(), **wrong)

"""A clock that only layers move: times in these tests are exact, whatever the machine does."""

import pytest
from torch import nn

from zoo_compress.profiling import fit, latency, search


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "clock", clock)
    for module in (fit, search):  # exact times need no repetition
        monkeypatch.setattr(module, "RUNS", (1, 1))
    monkeypatch.setattr(search, "FINAL_RUNS", (1, 1))
    return clock


@pytest.fixture
def layers_take_time(monkeypatch, clock):
    """Give every convolution and linear layer a duration: a function of the layer, in seconds."""

    def install(duration):
        for kind in (nn.Conv2d, nn.Linear):
            original = kind.forward

            def forward(self, x, original=original):
                clock.now += duration(self)
                return original(self, x)

            monkeypatch.setattr(kind, "forward", forward)

    return install

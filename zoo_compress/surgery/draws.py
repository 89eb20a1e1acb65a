"""Random numbers of a run that is only looked at: the same every time, and none of the program's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def same_draws(device: torch.device | None = None) -> Iterator[None]:
    """Within, torch draws the same random numbers every time; afterwards it goes on as if nothing had been drawn.

    Args:
        device: Where the model runs, if its generator matters beside that of the CPU.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        for other in devices:
            with torch.cuda.device(other):
                torch.cuda.manual_seed(0)
        yield

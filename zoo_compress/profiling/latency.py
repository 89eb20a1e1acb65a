"""Timing models against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CompressError
from ..surgery.modules import clear_caches

MAX_THREADS = 1024

clock = time.perf_counter
"""Seconds from some start. Everything timed here reads this clock, so that tests can let it tick as they need."""


@contextmanager
def inference(models: Collection[nn.Module], threads: int | None = None) -> Iterator[int]:
    """Within, models are in eval mode, nothing records gradients, and torch uses `threads` threads on the CPU (None: as it is set).

    Yields:
        The number of threads.

    Raises:
        CompressError: If `threads` is out of range or a model is not on the CPU.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS):
        raise CompressError(f"latency: expected 1 to {MAX_THREADS} threads, found {threads!r}")
    flags = {module: module.training for model in models for module in model.modules()}
    for module in flags:
        parameter = next(module.parameters(recurse=False), None)
        if parameter is not None and parameter.device.type != "cpu":
            raise CompressError(f"latency: expected a model on the CPU, found a {type(module).__name__} on {parameter.device}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    for module in flags:
        module.training = False
    try:
        with torch.no_grad():
            yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
        for module, training in flags.items():
            module.training = training
        for model in models:
            clear_caches(model)


def interleaved(models: Mapping[str, Callable[[Any], Any]], images: Mapping[str, Any], *, runs: int, warmup: int) -> dict[str, np.ndarray]:
    """Time forward passes in turns, so that what else the machine does falls on all models alike. To be called within `inference`.

    Args:
        models: Name to model, or to another pass to time.
        images: Name to its batch, or to what else the pass takes.
        runs: Timed passes of each model.
        warmup: Passes of each before, not timed.

    Returns:
        Name to seconds, (runs,). The i-th passes of all models were neighbours in time.
    """
    for name, model in models.items():
        for _ in range(warmup):
            model(images[name])
    times = {name: np.empty(runs) for name in models}
    for run in range(runs):
        for name, model in models.items():
            start = clock()
            model(images[name])
            times[name][run] = clock() - start
    return times


def ratio(times: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Latency as a fraction of another's, from interleaved runs.

    Returns:
        The median over neighbouring runs, which a drifting machine does not move, and its standard error as the quartiles give it.
    """
    ratios = times / base
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    # A normal distribution's quartiles lie 1.349 standard deviations apart, and its median errs by 1.253 / sqrt(n) of them.
    return float(median), float(high - low) / 1.349 * 1.253 / len(ratios) ** 0.5

"""What a model costs: parameters, MACs, and median latency measured on this machine's CPU."""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.data import resolve_model_data_config
from torch import nn

from ..errors import CompressError
from ..surgery.trace import analyze


@dataclass(frozen=True)
class Measurement:
    """Cost of one model.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates of one image at the model's own input size.
        latency_ms: median milliseconds of one forward pass on CPU.
        latency_iqr_ms: distance between the quartiles of the same runs.
        batch_size: images in that pass.
        threads: CPU threads torch used.
    """

    params: int
    macs: int
    latency_ms: float
    latency_iqr_ms: float
    batch_size: int
    threads: int


def measure(model: nn.Module, batch_size: int = 1, threads: int | None = None, *, runs: int = 100, warmup: int = 10) -> Measurement:
    """Measure one model; see `measure_many`."""
    return measure_many({"model": model}, batch_size, threads, runs=runs, warmup=warmup)["model"]


def measure_many(
    models: Mapping[str, nn.Module], batch_size: int = 1, threads: int | None = None, *, runs: int = 100, warmup: int = 10
) -> dict[str, Measurement]:
    """Measure models against each other. Runs are interleaved, so that what else the machine does falls on all of them alike.

    Args:
        models: name to timm model. Weights and training modes are left as they were; models on other devices are refused.
        batch_size: images in each forward pass, of the size the model's `pretrained_cfg` names.
        threads: CPU threads; None takes what torch is set to.
        runs: timed passes of each model.
        warmup: passes before, not timed.

    Returns:
        Name to measurement, in the given order.

    Raises:
        CompressError: a number is below 1, a model is not on the CPU, or cannot be analysed.
    """
    for name, value in {"batch_size": batch_size, "threads": threads or 1, "runs": runs, "warmup": warmup}.items():
        if value < 1:
            raise CompressError(f"measure: expected {name} of at least 1, found {value}")
    counts = {name: _counts(name, model) for name, model in models.items()}
    inputs = {name: torch.zeros(batch_size, *resolve_model_data_config(model)["input_size"]) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with _threads(threads) as used, _evaluating(models), torch.no_grad():
        for name, model in models.items():
            for _ in range(warmup):
                model(inputs[name])
        for _ in range(runs):
            for name, model in models.items():
                start = time.perf_counter()
                model(inputs[name])
                times[name].append((time.perf_counter() - start) * 1e3)
    result = {}
    for name, (params, macs) in counts.items():
        low, median, high = statistics.quantiles(times[name], n=4, method="inclusive") if runs > 1 else times[name] * 3
        result[name] = Measurement(params, macs, median, high - low, batch_size, used)
    return result


def _counts(name: str, model: nn.Module) -> tuple[int, int]:
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type != "cpu":
        raise CompressError(f"measure: expected {name} on the CPU, found it on {parameter.device}")
    return sum(p.numel() for p in model.parameters()), analyze(model).macs()


@contextmanager
def _threads(threads: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluating(models: Mapping[str, nn.Module]) -> Iterator[None]:
    before = [(model, model.training) for model in models.values()]
    for model, _ in before:
        model.eval()
    try:
        yield
    finally:
        for model, training in before:
            model.train(training)

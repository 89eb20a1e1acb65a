"""What a model costs: parameters, MACs, memory, and median latency measured on this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from timm.models import get_model_input_config
from torch import nn

from ..errors import CompressError
from ..surgery.hooks import away
from ..surgery.images import fitting
from ..surgery.modules import refuse_wrapped, uncompiled
from ..surgery.trace import count_macs
from .latency import inference, interleaved
from .memory import activation_memory, weight_memory
from .sampled import Sampled

MAX_BATCH = 2**16


@dataclass(frozen=True)
class Measurement:
    """Cost of one model. Of one that does not treat all images alike (`Sampled`), MACs and time are averages over images it saw.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates of one image at the model's own input size.
        latency_ms: Median milliseconds of one forward pass on the CPU.
        latency_iqr_ms: Distance between the quartiles of the same runs.
        weight_memory: Bytes of parameters and buffers.
        activation_memory: Most bytes that the tensors of one forward pass take up at one time, its input included and the weights not;
            counted, so the same on every machine. What kernels use while they run, and the allocator without need, is not in it.
        batch_size: Images in that pass.
        threads: CPU threads torch used.
    """

    params: int
    macs: int
    latency_ms: float
    latency_iqr_ms: float
    weight_memory: int
    activation_memory: int
    batch_size: int
    threads: int

    @property
    def peak_memory(self) -> int:
        """Bytes of weights and activations together: what one forward pass needs at least."""
        return self.weight_memory + self.activation_memory


def measure(model: nn.Module, batch_size: int = 1, threads: int | None = None, *, runs: int = 100, warmup: int = 10) -> Measurement:
    """Measure one model; see `measure_many`."""
    return measure_many({"model": model}, batch_size, threads, runs=runs, warmup=warmup)["model"]


def measure_many(
    models: Mapping[str, nn.Module], batch_size: int = 1, threads: int | None = None, *, runs: int = 100, warmup: int = 10
) -> dict[str, Measurement]:
    """Measure models against each other. Runs are interleaved, so that what else the machine does falls on all of them alike.

    Args:
        models: Name to timm model. Weights and training modes are left as they were; models on other devices are refused.
        batch_size: Images in each forward pass, of the size the model's `pretrained_cfg` names.
        threads: CPU threads; None takes what torch is set to.
        runs: Timed passes of each model.
        warmup: Passes before, not timed.

    Returns:
        Name to measurement, in the given order.

    Raises:
        CompressError: If a number is below 1, a model is not on the CPU, or cannot be analysed.
    """
    for name, value in {"batch_size": batch_size, "runs": runs, "warmup": warmup}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CompressError(f"measure: expected {name} of at least 1, found {value!r}")
    if batch_size > MAX_BATCH:
        raise CompressError(f"measure: expected a batch_size of at most {MAX_BATCH}, found {batch_size}")
    for model in models.values():
        refuse_wrapped(model, compiled=False)
    macs = {name: model.macs() if isinstance(model, Sampled) else count_macs(uncompiled(model)) for name, model in models.items()}
    images = {name: _images(model, batch_size) for name, model in models.items()}
    passes = {name: _over(model) for name, model in models.items()}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(away(model))
        used = stack.enter_context(inference(models.values(), threads))
        activations = {name: activation_memory(model, images[name][0]) for name, model in models.items()}
        times = interleaved(passes, images, runs=runs, warmup=warmup)
    found = {}
    for name, model in models.items():
        low, median, high = 1e3 * np.quantile(times[name] / len(images[name]), (0.25, 0.5, 0.75))
        found[name] = Measurement(
            params=sum(p.numel() for p in model.parameters()),
            macs=macs[name],
            latency_ms=float(median),
            latency_iqr_ms=float(high - low),
            weight_memory=weight_memory(model),
            activation_memory=activations[name],
            batch_size=batch_size,
            threads=used,
        )
    return found


def _images(model: nn.Module, batch_size: int) -> list[torch.Tensor]:
    """Batches to time a model over: one without content, where all images take the same time."""
    blank = torch.zeros(batch_size, *get_model_input_config(model)["input_size"])
    return [fitting(model, batch) for batch in (model.batches(batch_size) if isinstance(model, Sampled) else [blank])]


def _over(model: nn.Module) -> Callable[[list[torch.Tensor]], None]:
    def run(batches: list[torch.Tensor]) -> None:
        for batch in batches:
            model(batch)

    return run

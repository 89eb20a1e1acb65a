"""Statistics of BatchNorms, estimated again on images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from ..errors import CompressError
from ..structure.layout import Layout, Widths
from .images import fitting, image_batches
from .resize import picks, reindex
from .tracer import MODEL_ERRORS

Module = TypeVar("Module", bound=nn.Module)
Statistics = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Path of a BatchNorm → mean and variance of its input."""


def calibrate(model: Module, data: Iterable[object]) -> Module:
    """Re-estimate the running statistics of every BatchNorm, in place, as the average over all batches.

    After channels were removed, the statistics of what comes after no longer hold. Nothing is trained: weights stay as they are (Yu & Huang
    2019, Universally Slimmable Networks, section 3.4). What is found holds for these images; a few hundred differ from what a model was
    trained on, which costs accuracy. `zoo_compress.prune(…, reconstruct=data)` corrects only what pruning changed.

    Args:
        model: The model. Its training mode is left as it was.
        data: Batches of images (batch, channels, height, width), or of (images, anything).

    Returns:
        The same model.

    Raises:
        CompressError: If `data` gives no batches that the model takes; the statistics are then as they were.
    """
    batches = image_batches(data)
    try:
        _write(model, estimate(model, batches))
    except MODEL_ERRORS as error:
        raise CompressError(f"data: expected batches of images that {type(model).__name__} takes: {error}") from error
    return model


def follow_(resized: nn.Module, model: nn.Module, layout: Layout, widths: Widths, images: Sequence[torch.Tensor]) -> None:
    """Change a resized model's statistics as the removal changed them, in place.

    Both models are run on the same images. The stored means move by the difference of the two estimates, in units of the stored deviation;
    the stored variances by their ratio. So what a few images get wrong about the data falls out, and a model that nothing was removed from
    keeps its statistics to the bit.

    Args:
        resized: What `resize(model, layout, widths)` made, its weights perhaps reconstructed since.
        model: The model before.
        layout: Its layout.
        widths: The choice.
        images: Batches (batch, channels, height, width).
    """
    pick = picks(layout, widths)
    stored, before, after = _read(model), estimate(model, images), estimate(resized, images)

    def kept(path: str, statistic: torch.Tensor) -> torch.Tensor:
        chosen = reindex(statistic, layout.params[f"{path}.running_mean"], layout, pick)
        return statistic if chosen is None else chosen

    changed = {}
    for path, (new_mean, new_variance) in after.items():
        (mean, variance), (old_mean, old_variance) = ((kept(path, t) for t in known[path]) for known in (stored, before))
        tiny = torch.finfo(variance.dtype).tiny
        scale = (variance / old_variance.clamp_min(tiny)).sqrt()
        changed[path] = mean + (new_mean - old_mean) * scale, variance * (new_variance / old_variance.clamp_min(tiny))
    _write(resized, changed)


def estimate(model: nn.Module, images: Sequence[torch.Tensor]) -> Statistics:
    """The statistics that BatchNorms have on some batches when each normalises by its own batch. The model is left as it was."""
    norms, stored = _norms(model), _read(model)
    if not norms:
        return {}
    settings = {path: (norm.momentum, norm.num_batches_tracked) for path, norm in norms.items()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for norm in norms.values():
            norm.momentum = None  # the cumulative average
            norm.num_batches_tracked = torch.zeros((), dtype=torch.long)
            norm.train()
        with torch.no_grad():
            for batch in tqdm(images, desc="statistics", unit="batch", leave=False):
                model(fitting(model, batch))
        return _read(model)
    finally:
        for path, (momentum, count) in settings.items():
            norms[path].momentum, norms[path].num_batches_tracked = momentum, count
        _write(model, stored)
        for module, training in modes:
            module.training = training


def _norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


def _read(model: nn.Module) -> Statistics:
    return {path: (norm.running_mean.clone(), norm.running_var.clone()) for path, norm in _norms(model).items()}  # type: ignore[union-attr]


def _write(model: nn.Module, statistics: Statistics) -> None:
    for path, norm in _norms(model).items():
        if path in statistics:
            norm.running_mean.copy_(statistics[path][0])  # type: ignore[union-attr]
            norm.running_var.copy_(statistics[path][1])  # type: ignore[union-attr]

"""Statistics of normalisation layers, estimated again on images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch import nn
from tqdm import tqdm

from ..errors import CompressError
from ..structure.bank import Choice
from ..structure.layout import Layout, Widths
from .elastic import Elastic
from .images import fitting, image_batches
from .modules import get_tensor, statistics, takes_model
from .resize import picks, reindex
from .tracer import MODEL_ERRORS

Module = TypeVar("Module", bound=nn.Module)
E = TypeVar("E", bound=Elastic)
Statistics = dict[str, torch.Tensor]
"""Name of a buffer (`bn1.running_mean`, `bn1.running_var`) → its value."""

# A channel that varies as on the training data at a share p of the positions, and not at all at others, has p times the stored variance.
# A few hundred images have some ten thousand positions in late layers: below this they show one of them, and one value has no variance.
STILL = 1e-4
"""A variance on images below this part of the stored one says nothing of it: the channel is dead on them, or all but dead."""


@overload
def calibrate(model: Module, data: Iterable[object], /) -> Module: ...
@overload
def calibrate(model: E, width: float | Mapping[str, int], data: Iterable[object], /) -> E: ...
@takes_model
def calibrate(model: Any, *arguments: Any) -> Any:
    """Re-estimate the running statistics of every BatchNorm, in place, as the average over all batches.

    `calibrate(model, data)`: after channels were removed, the statistics of what comes after no longer hold. Nothing is trained: weights
    stay as they are (Yu & Huang 2019, Universally Slimmable Networks, section 3.4). What is found holds for these images; a few hundred
    differ from what a model was trained on, which costs accuracy. `zoo_compress.prune(…, reconstruct=data)` corrects only what pruning
    changed.

    `calibrate(net, width, data)`: the same for one choice of widths of a slimmable network, which keeps what is found beside that of its
    other widths. The chosen width of the network stays as it was.

    Args:
        model: The model. Its training mode is left as it was.
        width: A fraction of the widths, or axis → size.
        data: Batches of images (batch, channels, height, width), or of (images, anything).

    Returns:
        The same model.

    Raises:
        CompressError: If `data` gives no batches that the model takes; the statistics are then as they were. If the network does not run
            at that width.
    """
    if len(arguments) not in (1, 2) or (len(arguments) == 2 and not isinstance(model, Elastic)):
        raise CompressError(
            f"calibrate: expected (model, images), or (net, width, images) of a slimmable network, found {type(model).__name__} and "
            f"{len(arguments)} more arguments"
        )
    *width, data = arguments
    batches = image_batches(data)
    try:
        if width:
            _calibrate_width(model, width[0], batches)
        else:
            _write(model, estimate(model, batches))
    except MODEL_ERRORS as error:
        if isinstance(error, CompressError):
            raise
        raise CompressError(f"data: expected batches of images that {type(model).__name__} takes: {error}") from error
    return model


def _calibrate_width(net: Elastic, width: float | Mapping[str, int], batches: Sequence[torch.Tensor]) -> None:
    before = net.sizes
    sizes, fraction = net.sizes_at(width)
    net.set_widths(sizes)
    try:
        with net.at_widths():
            found = estimate(net, batches)
        net.add_choice(Choice(sizes=sizes, width=fraction), found)
    finally:
        net.set_widths(before)


@contextmanager
def calibrated(net: Elastic, images: Sequence[torch.Tensor]) -> Iterator[Statistics]:
    """Within, an elastic network has statistics at its chosen widths that were found on these images; after, it is as it was.

    Args:
        net: The network.
        images: Batches (batch, channels, height, width).
    """
    with net.at_widths():
        found = estimate(net, images)
        before = _read(net)
        _write(net, found)
        try:
            yield found
        finally:
            _write(net, before)


def follow_(resized: nn.Module, model: nn.Module, layout: Layout, widths: Widths, images: Sequence[torch.Tensor]) -> None:
    """Change a resized model's statistics as the removal changed them, in place.

    Both models are run on the same images. The stored means move by the difference of the two estimates, in units of the stored deviation;
    the stored variances by their ratio. So what a few images get wrong about the data falls out, and a model that nothing was removed from
    keeps its statistics to the bit. A channel that is dead on the images before keeps its own too: there is nothing to measure a change in.
    One that is dead on them only after keeps its variance, or whatever wakes it later would be blown up.

    Args:
        resized: What `resize(model, layout, widths)` made, its weights perhaps reconstructed since.
        model: The model before.
        layout: Its layout.
        widths: The choice.
        images: Batches (batch, channels, height, width).
    """
    pick = picks(layout, widths)
    stored, before, after = _read(model), estimate(model, images), estimate(resized, images)

    def kept(name: str, statistic: torch.Tensor) -> torch.Tensor:
        chosen = reindex(statistic, layout.params[name], layout, pick)
        return statistic if chosen is None else chosen

    changed = {}
    for name, new in after.items():
        if not name.endswith("running_var"):
            continue
        mean = f"{name.removesuffix('var')}mean"
        variance, old = kept(name, stored[name]), kept(name, before[name])
        alive = old > STILL * variance
        changed[name] = torch.where(alive & (new > STILL * variance), variance * (new / old), variance)
        if mean in after:
            centre = kept(mean, stored[mean])
            moved = centre + (after[mean] - kept(mean, before[mean])) * (variance / old).sqrt()
            changed[mean] = torch.where(alive, moved, centre)
    _write(resized, changed)


def estimate(model: nn.Module, images: Sequence[torch.Tensor]) -> Statistics:
    """The statistics that normalisation layers have on some batches when each normalises by its own. The model is left as it was.

    Raises:
        CompressError: If the statistics are tensors of `torch.inference_mode`, which nothing can change.
    """
    norms = [model.get_submodule(path) for path in statistics(model)]
    if not norms:
        return {}
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm._buffers.values() if buffer is not None]
    if any(buffer.is_inference() for buffer, _ in buffers):
        raise CompressError(
            f"{type(model).__name__} was made within torch.inference_mode: its statistics cannot be changed. Make or load it outside, or "
            "pass copy.deepcopy(model), called outside"
        )
    momenta = [getattr(norm, "momentum", None) for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for norm in norms:
            norm.train()
        with torch.no_grad():
            for batch, part in enumerate(tqdm(images, desc="statistics", unit="batch", leave=False)):
                for norm in norms:
                    norm.momentum = 1 / (batch + 1)  # type: ignore[assignment]  # the cumulative average
                model(fitting(model, part))
        return _read(model)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum  # type: ignore[assignment]
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, training in modes:
            module.training = training


def _read(model: nn.Module) -> Statistics:
    names = [name for names in statistics(model).values() for name in names if name.rpartition(".")[2].startswith("running_")]
    return {name: get_tensor(model, name).detach().clone() for name in names}


def _write(model: nn.Module, found: Statistics) -> None:
    for name, value in found.items():
        get_tensor(model, name).copy_(value)

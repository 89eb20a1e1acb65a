"""Images that a user passes, for methods that look at what a model does and not at labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import CompressError

LIMIT = 1024
"""Images that are kept in memory; more change nothing in what is measured with them."""


def image_batches(data: Iterable[object]) -> list[torch.Tensor]:
    """The images of some batches, the first `LIMIT` of them.

    Args:
        data: Batches of images (batch, channels, height, width), or tuples that begin with one.

    Raises:
        CompressError: If there is none, or something else.
    """
    try:
        batches = iter(data)
    except TypeError as error:
        raise CompressError(f"data: expected batches of images, found {type(data).__name__}") from error
    found: list[torch.Tensor] = []
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, torch.Tensor) or images.ndim < 2 or not images.is_floating_point() or len(images) == 0:
            what = f"a {images.dtype} tensor of shape {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
            raise CompressError(f"data: expected batches of images (batch, channels, height, width) as floats, found {what}")
        found.append(images[: LIMIT - sum(map(len, found))])
        if sum(map(len, found)) >= LIMIT:
            break
    if not found:
        raise CompressError("data: expected at least one batch of images, found none")
    return found


def fitting(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images where a model is, in the precision of its weights; what is no floating-point number stays that."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return images
    return images.to(parameter.device, parameter.dtype if images.is_floating_point() else images.dtype)


def parted(images: list[torch.Tensor], half: int, size: int, limit: int) -> list[torch.Tensor]:
    """The even (0) or odd (1) images over all batches, in batches of at most `size`, the first `limit` of them."""
    found: list[torch.Tensor] = []
    seen = 0
    for batch in images:
        chosen = batch[(half - seen) % 2 :: 2][: limit - sum(map(len, found))]
        found += [part for part in chosen.split(size) if len(part)]
        seen += len(batch)
    return found

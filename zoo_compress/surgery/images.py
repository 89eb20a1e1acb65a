"""Images that a user passes, for methods that look at what a model does and not at labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch

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

"""Models that do not treat all images alike: what a pass costs is known only for images that were seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import CompressError

IMAGES = 64
"""Images that are kept to measure time on."""


class Sampled(nn.Module):
    """A model that notes what it does while it is evaluated, and can be measured on the images it saw.

    Args:
        costs: MACs of a sample that takes each of its ways.
    """

    def __init__(self, costs: Sequence[int]) -> None:
        super().__init__()
        self._costs = tuple(costs)
        self._counts = torch.zeros(len(costs), dtype=torch.int64)
        self._images: list[torch.Tensor] = []
        self._noting = True

    def note(self, images: torch.Tensor, taken: torch.Tensor) -> None:
        """Note a batch.

        Args:
            images: (batch, channels, height, width).
            taken: Which way each sample took, (batch,).
        """
        if not self._noting:
            return
        self._counts += torch.bincount(taken.cpu(), minlength=len(self._costs))
        missing = IMAGES - sum(map(len, self._images))
        if missing > 0:
            self._images.append(images[:missing].detach().cpu().clone())

    @property
    def fractions(self) -> tuple[float, ...]:
        """Fraction of the samples seen that took each way."""
        return tuple((self._counts.double() / max(int(self._counts.sum()), 1)).tolist())

    def macs(self) -> int:
        """Average MACs of the samples seen.

        Raises:
            CompressError: If none were.
        """
        self._check_seen()
        return round(sum(fraction * cost for fraction, cost in zip(self.fractions, self._costs, strict=True)))

    def batches(self, size: int) -> list[torch.Tensor]:
        """Batches of images that were seen, all of this size, to time passes over; what these do is not noted any more.

        Raises:
            CompressError: If none were.
        """
        self._check_seen()
        self._noting = False
        images = torch.cat(self._images)
        return list(images[torch.arange(-(-len(images) // size) * size) % len(images)].split(size))

    def _check_seen(self) -> None:
        if not self._images:
            raise CompressError(f"{type(self).__name__}: what it costs depends on images: expected to have seen some, found none")

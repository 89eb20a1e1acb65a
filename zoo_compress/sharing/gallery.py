"""Which images leave a network early and which late, as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import nn

from ..errors import CompressError
from ..figures import blank_figure, check_figure, save_figure
from ..surgery.exits import ExitsModel
from ..surgery.images import fitting, image_batches


def by_exit(
    net: nn.Module, images: Iterable[object], threshold: float | Sequence[float | None] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """At which exit images leave.

    Args:
        net: A network with exits.
        images: Batches of images, preprocessed as the network wants them, or of tuples that begin with one.
        threshold: As for `infer`; without it, the stored thresholds.

    Returns:
        The images (images, channels, height, width), and the exit each left at (images,).

    Raises:
        CompressError: If the network has no exits, or thresholds are neither given nor stored.
    """
    if not isinstance(net, ExitsModel) or net.record.truncated:
        raise CompressError(f"plot_exits: expected a network with exits, found {type(net).__name__}")
    if threshold is None:
        threshold = net.record.thresholds
        if threshold is None:
            raise CompressError("plot_exits: expected threshold=, or thresholds stored by calibrate, found neither")
    batches = image_batches(images)
    confidence = net.record.confidence if threshold is net.record.thresholds else None
    left = [net.infer(fitting(net, batch), threshold=threshold, confidence=confidence, return_exits=True)[1] for batch in batches]
    return torch.cat(batches).cpu(), torch.cat(left).cpu()


def plot_exits(
    net: nn.Module,
    images: Iterable[object],
    path: str | Path,
    *,
    threshold: float | Sequence[float | None] | None = None,
    columns: int = 12,
) -> tuple[int, ...]:
    """Draw example images by the exit at which they leave, one row an exit; needs the extra `plots`.

    Args:
        net: A network with exits.
        images: As for `by_exit`; the first of each exit are drawn.
        path: Image file; its ending says which kind.
        threshold: As for `infer`; without it, the stored thresholds.
        columns: Images in a row, at most.

    Returns:
        How many images left at each exit, the network's own end last.

    Raises:
        CompressError: As `by_exit`, or if the picture cannot be written or matplotlib is missing.
    """
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise CompressError(f"plot_exits: expected columns of at least 1, found {columns!r}")
    check_figure(path)
    shown, left = by_exit(net, images, threshold)
    pixels = _pixels(net, shown)
    exits = len(net.exits)  # type: ignore[arg-type]
    counts = tuple(int(count) for count in torch.bincount(left, minlength=exits + 1))
    figure = blank_figure((0.6 * columns + 1.6, 0.75 * (exits + 1)))
    for exit, count in enumerate(counts):
        axes = figure.add_subplot(exits + 1, 1, exit + 1)
        axes.imshow(_row(pixels[left.numpy() == exit][:columns], columns, pixels), cmap="gray", vmin=0, vmax=1, aspect="equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
        name = f"exit {exit}" if exit < exits else "end"
        axes.set_ylabel(f"{name}\n{count / len(left):.0%}", rotation=0, ha="right", va="center", fontsize=8)
    save_figure(figure, path, dpi=120, bbox_inches="tight")
    return counts


def _pixels(net: nn.Module, images: torch.Tensor) -> np.ndarray:
    """Images before normalisation, with values from 0 to 1: (images, height, width) of grey ones, else (images, height, width, 3)."""
    config = resolve_model_data_config(net)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    found = (images.float() * std + mean).clamp(0, 1).movedim(1, -1).numpy()
    return found[..., :3] if found.shape[-1] >= 3 else found[..., 0]


def _row(some: np.ndarray, columns: int, like: np.ndarray) -> np.ndarray:
    """Images side by side, white where there are none."""
    row = np.ones((like.shape[1], columns * (like.shape[2] + 1) - 1, *like.shape[3:]), like.dtype)
    for column, image in enumerate(some):
        start = column * (like.shape[2] + 1)
        row[:, start : start + like.shape[2]] = image
    return row

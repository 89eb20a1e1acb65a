"""What a model's layers see: second moments of their inputs, gathered while the model runs on images.

For a layer y = W x + b they hold everything least squares needs, for any choice of inputs that stay: no activation is stored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ..errors import CompressError
from ..structure import terms
from ..structure.layout import Layout, parse
from .divergence import gives_logits, own_loss
from .images import fitting
from .modules import copied, every_output, in_eval_mode
from .tracer import MODEL_ERRORS, named_tensors

ROWS = 2**15
"""Positions (pixels, tokens) of a layer's input that are looked at, spread evenly over the images."""

COLUMNS = 2**13
"""A layer that reads more inputs than this (channels × kernel positions) is left out: its moments would not fit in memory."""

CHUNK = 16
"""Images that run forward and backward at once."""


@dataclass
class Moments:
    """Second moments of one layer's inputs z = (x, 1), apart for the even and the odd images.

    Attributes:
        sums: Sum of z zᵀ over sampled positions, (halves, groups, columns + 1, columns + 1). Columns are ordered as in the flattened
            weight: (inputs of a group, kernel positions).
        sensitivity: For each output, the squared gradient of `own_loss` by it, summed over positions, mean over images, (outputs,): the
            diagonal of the curvature of the model's divergence. Zeros where it was not asked for.
        rows: Number of positions summed, per half.
        bias: Name of the bias parameter; None if there is none.
        norm: Name of the running mean of the BatchNorm that alone reads the layer's output, and so can take a change of its mean; None if
            there is none.
    """

    sums: torch.Tensor
    sensitivity: torch.Tensor
    rows: list[int] = field(default_factory=lambda: [0, 0])
    bias: str | None = None
    norm: str | None = None

    @property
    def has_intercept(self) -> bool:
        """Whether the mean of the output can be corrected."""
        return self.bias is not None or self.norm is not None

    def covariance(self, halves: Sequence[int] = (0, 1)) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Moments of the inputs over some halves: (groups, columns, columns), (groups, columns) and the number of rows.

        About their mean, which comes second, if the layer has an intercept; else about zero, and the mean is zero.
        """
        rows = sum(self.rows[half] for half in halves)
        total = self.sums[list(halves)].double().sum(0) / max(rows, 1)
        second, mean = total[:, :-1, :-1], total[:, :-1, -1]
        if not self.has_intercept:
            return second, torch.zeros_like(mean), rows
        return second - mean[:, :, None] * mean[:, None, :], mean, rows


def consumers(model: nn.Module, layout: Layout) -> list[str]:
    """Names of the convolution and linear weights that read a free axis, in the model's order."""
    found = []
    for name, parameter in model.named_parameters():
        dims = layout.params.get(name, ())
        if len(dims) >= 2 and any(layout.axes[axis].frozen is None for axis in terms.axes(parse(dims[1]))):
            columns = math.prod(parameter.shape[1:])
            if columns <= COLUMNS:
                found.append(name)
    return found


def gather(
    model: nn.Module, layout: Layout, images: Sequence[torch.Tensor], *, sensitivity: bool = False, seed: int = 0
) -> dict[str, Moments]:
    """Run a model on images and gather the moments of its consumers' inputs.

    Args:
        model: The model. A copy runs, in eval mode.
        layout: Its layout.
        images: Batches (batch, channels, height, width).
        sensitivity: Also run backward, for `Moments.sensitivity`.
        seed: Of the positions looked at and the labels drawn.

    Returns:
        Weight name → moments, for the layers that ran through `linear` or a convolution with the parameter itself as weight. (Where the
        weight is computed from its parameter, least squares on the parameter would not be linear.)

    Raises:
        CompressError: If the model does not take the images, or computes infinities or NaNs of them.
    """
    count = sum(map(len, images))
    model = in_eval_mode(copied(model))
    generator = torch.Generator().manual_seed(seed)
    watch = _Watch(model, consumers(model, layout), max(1, math.ceil(ROWS / max(count, 1))), generator)
    chunks = [chunk for batch in images for chunk in batch.split(CHUNK)]
    for chunk in tqdm(chunks, desc="layer inputs", unit="batch", leave=False):
        # The graph hangs on the image: no gradient of a parameter is computed or kept.
        image = fitting(model, chunk).detach().clone().requires_grad_(sensitivity)
        try:
            with torch.set_grad_enabled(sensitivity), watch.batch(len(image)), every_output(model):
                output = model(image)
        except MODEL_ERRORS as error:
            raise CompressError(f"data: expected batches of images that {type(model).__name__} takes: {error}") from error
        if sensitivity:
            with torch.enable_grad():  # wherever this is called
                torch.autograd.grad(own_loss(output, generator, logits=gives_logits(model, output)), image)
    for name, moments in watch.found.items():
        moments.sensitivity /= count
        if not moments.sums.isfinite().all() or not moments.sensitivity.isfinite().all():
            raise CompressError(f"data: expected images on which the model computes finite numbers; {name!r} reads or causes others")
    return watch.found


class _Watch(TorchFunctionMode):
    """Sees every call of `linear` and of convolutions whose weight is one of the watched parameters."""

    def __init__(self, model: nn.Module, names: Sequence[str], positions: int, generator: torch.Generator) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        self.found: dict[str, Moments] = {}
        self._weights = {id(parameters[name]): name for name in names}
        self._names = {id(tensor): name for name, tensor in named_tensors(model)}
        self._positions = positions
        self._generator = generator
        self._seen = self._batch = 0
        self._readers: dict[str, set[str | None]] = {}

    @contextmanager
    def batch(self, size: int) -> Iterator[None]:
        """Within, the model runs on the next `size` images."""
        self._batch, self._readers = size, {}
        with self:
            yield
        self._seen += size
        for name, readers in self._readers.items():
            (reader,) = readers if len(readers) == 1 else (None,)
            self.found[name].norm = reader

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        for tensor in (*args, *kwargs.values()):
            layer = getattr(tensor, "_zc_layer", None) if isinstance(tensor, torch.Tensor) else None
            if layer is not None:
                mean = _mean(*args, **kwargs) if func is F.batch_norm else None
                self._readers.setdefault(layer, set()).add(self._names.get(id(mean)))
        if func in _UNFOLDS:
            self._look(result, *_UNFOLDS[func](self._batch, *args, **kwargs))
        return result

    def _look(
        self, output: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, channels: int, positions: int, rows: Rows
    ) -> None:
        name = self._weights.get(id(weight))
        if name is None:
            return
        chosen = torch.arange(positions)
        if positions > self._positions:
            chosen = torch.randperm(positions, generator=self._generator)[: self._positions]
        inputs = rows(chosen)  # (batch, positions, groups, columns)
        _, _, groups, columns = inputs.shape
        moments = self.found.get(name)
        if moments is None:
            moments = self.found[name] = Moments(
                torch.zeros(2, groups, columns + 1, columns + 1), torch.zeros(len(weight), dtype=torch.float64)
            )
            moments.bias = None if bias is None else self._names.get(id(bias))
        for half in range(2):
            z = inputs[(half - self._seen) % 2 :: 2].detach().float().flatten(0, 1)
            z = F.pad(z, (0, 1), value=1.0).movedim(1, 0)
            moments.sums[half] += (z.mT @ z).cpu()
            moments.rows[half] += z.shape[1]
        output._zc_layer = name  # type: ignore[attr-defined]
        if output.requires_grad:
            others = [d for d in range(output.ndim) if d != channels % output.ndim]

            def add(grad: torch.Tensor) -> None:
                moments.sensitivity.add_(grad.square().sum(others).double().cpu())

            output.register_hook(add)


Rows = Callable[[torch.Tensor], torch.Tensor]
"""Positions → inputs there, (batch, positions, groups, columns)."""


def _mean(input: torch.Tensor, running_mean: torch.Tensor | None, *_: Any, **__: Any) -> torch.Tensor | None:
    return running_mean


def _linear(images: int, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
    flat = input.reshape(-1, 1, input.shape[-1])
    # Windows and the like are cut out image by image; where rows don't divide among images, each is a sample of its own.
    samples = flat.unflatten(0, (images, -1)) if len(flat) % images == 0 else flat[:, None]
    return weight, bias, -1, samples.shape[1], lambda chosen: samples[:, chosen]


def _convolution(
    images: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, ...]:
    kernel = weight.shape[2:]
    stride, dilation = ([value] * len(kernel) if isinstance(value, int) else list(value) for value in (stride, dilation))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        sides = [(total // 2, total - total // 2) if padding == "same" else (0, 0) for total in reach]
    else:
        sides = [(p, p) for p in ([padding] * len(kernel) if isinstance(padding, int) else padding)]
    spatial = input.shape[2:]
    out = [(n + sum(side) - r - 1) // s + 1 for n, side, r, s in zip(spatial, sides, reach, stride, strict=True)]

    def rows(chosen: torch.Tensor) -> torch.Tensor:
        padded = F.pad(input.detach(), [amount for side in reversed(sides) for amount in side])
        places = [place * s for place, s in zip(torch.unravel_index(chosen, out), stride, strict=True)]
        taps = [
            padded[(slice(None), slice(None), *(p + t * d for p, t, d in zip(places, tap, dilation, strict=True)))]
            for tap in itertools.product(*map(range, kernel))
        ]
        stacked = torch.stack(taps, 2)  # (batch, channels, taps, positions)
        return stacked.movedim(3, 1).reshape(len(input), len(chosen), groups, -1)

    return weight, bias, 1, math.prod(out), rows


_UNFOLDS: dict[Any, Callable[..., tuple[Any, ...]]] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
}
"""Function → what it reads, given the number of images and its arguments, by torch's names: weight, bias, the output's channel dimension,
number of positions per image, and `Rows`."""

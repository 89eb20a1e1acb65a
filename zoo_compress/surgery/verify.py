"""Proof that a layout describes its model: permute, shrink and zero, and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import AnalysisError, VerificationError
from ..structure import terms
from ..structure.layout import Layout, Widths, parse
from ..structure.widths import groups
from .calibrate import estimate
from .images import fitting
from .modules import clear_caches, copied, every_output, takes_model
from .outputs import tensors_in
from .resize import check_fits, permuted_copy, picks, resize
from .trace import count_macs, default_input
from .tracer import MODEL_ERRORS, named_tensors

TOLERANCE = 1e-4
ROUNDING = 1e-5
"""A change that single precision may cause; a larger one is looked at in double precision."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What the proofs found.

    Attributes:
        permutation_error: Relative change (L2) of the output when every free axis is permuted everywhere it occurs.
        zeroing_error: Relative difference (L2) between the shrunk model and the model whose dropped elements are zeroed instead,
            over the axes that nothing normalises across; None if there is no such axis.
        axes_checked: Axes that were permuted.
        resized_macs: MACs of the model with every group of axes shrunk, counted by a new analysis; equal to the layout's arithmetic.
    """

    permutation_error: float
    zeroing_error: float | None
    axes_checked: tuple[str, ...]
    resized_macs: int


@takes_model
def verify(model: nn.Module, layout: Layout, example_input: torch.Tensor | None = None, seed: int = 0) -> Verification:
    """Prove a layout on its model.

    All proofs run on copies with randomised weights and statistics, so that nothing cancels by chance, in double precision where the
    model runs in it. Permutation: every free axis permuted everywhere at once. Resize: every group of axes shrunk at random; the model
    runs forward and backward and has the parameters and MACs the layout computes. Zeroing: axes that nothing normalises across shrunk
    at random give what the whole model gives with the dropped elements zeroed.

    Args:
        model: The model the layout was inferred of. It is not changed.
        layout: From `analyze`.
        example_input: Batch (batch, channels, height, width) whose shape and dtype to use; timm models know theirs.
        seed: Of the random weights, inputs and choices.

    Raises:
        VerificationError: Naming the axis, parameter or count that fails.
    """
    _check_fits(model, layout)
    generator = np.random.default_rng(seed)
    example = example_input if example_input is not None else default_input(model)
    subject, image, expected = randomised(model, tuple(example.shape), seed, double=True)
    change = _permutation_proof(subject, layout, generator, image, expected)
    widths = random_widths(layout, generator)
    macs = _resize_proof(subject, layout, widths, image)
    zeroing = _zeroing_error(subject, layout, widths, image)
    if zeroing is not None and not zeroing < TOLERANCE:
        raise VerificationError(f"zeroing proof: the shrunk model differs by {zeroing:.3g} (relative) from the zeroed one")
    return Verification(change, zeroing, tuple(_movable(layout)), macs)


def prove_permutation(model: nn.Module, layout: Layout, example_input: torch.Tensor | None = None, seed: int = 0) -> float:
    """The permutation proof alone, at the least cost: on one sample, in the model's own precision where its rounding suffices.

    Args:
        model: The model the layout was inferred of. It is not changed.
        layout: From `analyze`.
        example_input: As for `verify`.
        seed: As for `verify`.

    Returns:
        Relative change (L2) of the output when every free axis is permuted everywhere it occurs.

    Raises:
        VerificationError: Naming the parameter that does not fit, or the axis whose permutation changes the output in double precision.
    """
    _check_fits(model, layout)
    example = example_input if example_input is not None else default_input(model)
    shape = (1, *example.shape[1:])
    subject, image, expected = randomised(model, shape, seed, double=False)
    change = _permutation_error(subject, layout, _movable(layout), np.random.default_rng(seed), image, expected)
    if change < ROUNDING:
        return change
    subject, image, expected = randomised(model, shape, seed, double=True)
    return _permutation_proof(subject, layout, np.random.default_rng(seed), image, expected)


def _check_fits(model: nn.Module, layout: Layout) -> None:
    try:
        check_fits(model, layout)
    except ValueError as error:
        raise VerificationError(str(error)) from error


def _movable(layout: Layout) -> list[str]:
    return [name for name in layout.free if not layout.axes[name].ordered and layout.axes[name].size > 1]


def randomised(model: nn.Module, shape: tuple[int, ...], seed: int, *, double: bool) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A randomised copy in eval mode, an input for it and its output; with `double`, in double precision if the model runs in it.

    A model of less than single precision, whose rounding would hide everything, is looked at in single precision if it runs in that.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator)
    subject = copied(model).cpu().eval().requires_grad_(False)
    randomise_(subject, generator)
    parameter = next((p for p in subject.parameters() if p.is_floating_point()), None)
    if parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16):
        single = copied(subject).float()
        try:
            run_flat(single, image)
            subject, parameter = single, next(p for p in single.parameters() if p.is_floating_point())
        except RuntimeError:  # a model that mixes dtypes runs in its own only
            clear_caches(subject)
    if double:
        _settle(subject, generator, shape)
    if double and (parameter is None or parameter.dtype in (torch.float32, torch.float64)):
        precise = copied(subject).double()
        try:
            return precise, image.double(), run_flat(precise, image.double())
        except RuntimeError:  # a model that mixes dtypes runs in its own only
            clear_caches(subject)
    image = image.to(parameter.dtype if parameter is not None else image.dtype)
    return subject, image, run_flat(subject, image)


def randomise_(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and statistic of a model in place random values at which nothing cancels, vanishes or explodes."""
    for _, tensor in named_tensors(model):
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.ndim <= 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5)
        elif tensor.numel() > 1 and isinstance(tensor, nn.Parameter):
            spread = float(tensor.float().std())
            tensor.add_(torch.randn(tensor.shape, generator=generator) * max(0.5 * spread, 0.02))


def _settle(model: nn.Module, generator: torch.Generator, shape: tuple[int, ...]) -> None:
    """Move running statistics near those of the random weights: a deep network whose activations grow from layer to layer amplifies the
    rounding of its first until nothing can be told from its output."""
    images = fitting(model, torch.randn(max(shape[0], 2), *shape[1:], generator=generator))
    try:
        found = estimate(model, [images])
    except MODEL_ERRORS:  # a layer that sees one value a channel has no statistics of a batch
        return
    clear_caches(model)
    tensors = dict(named_tensors(model))
    for name, value in found.items():
        spread = torch.rand(value.shape, generator=generator)
        if name.endswith("running_var"):
            tensors[name].copy_((value * (0.5 + spread)).clamp_min(1e-3))
        else:
            tensors[name].copy_(value + (spread - 0.5) * value.std(correction=0))


def run_flat(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Every output of a model on a batch, flattened into one tensor."""
    with torch.no_grad(), every_output(model):
        return flat(model(image))


def flat(output: Any) -> torch.Tensor:
    """Every tensor of a model's output, flattened into one."""
    return torch.cat([leaf.reshape(-1) for leaf in tensors_in(output)])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference (L2) of two tensors."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _permutation_proof(
    model: nn.Module, layout: Layout, generator: np.random.Generator, image: torch.Tensor, expected: torch.Tensor
) -> float:
    movable = _movable(layout)
    change = _permutation_error(model, layout, movable, generator, image, expected)
    if not change < TOLERANCE:
        names = _guilty(model, layout, movable, generator, image, expected)
        raise VerificationError(f"permutation proof: permuting axis {names} changes the output by {change:.3g} (relative)")
    return change


def _permutation_error(
    model: nn.Module, layout: Layout, names: Sequence[str], generator: np.random.Generator, image: torch.Tensor, expected: torch.Tensor
) -> float:
    pick = {name: generator.permutation(layout.axes[name].size) for name in names}
    permuted = permuted_copy(model, layout, pick)
    clear_caches(permuted)
    return relative(run_flat(permuted, image), expected)


def _guilty(
    model: nn.Module, layout: Layout, names: Sequence[str], generator: np.random.Generator, image: torch.Tensor, expected: torch.Tensor
) -> str:
    """Bisect to one axis whose permutation alone changes the output."""
    while len(names) > 1:
        half = names[: len(names) // 2]
        wrong = not _permutation_error(model, layout, half, generator, image, expected) < TOLERANCE
        names = half if wrong else names[len(names) // 2 :]
    name = names[0]
    places = [f"{param} {list(dims)}" for param, dims in layout.params.items() if any(name in terms.axes(parse(d)) for d in dims)]
    return f"{name!r} (in {', '.join(places[:4])}{', …' if len(places) > 4 else ''})"


def random_widths(layout: Layout, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """A choice that shrinks every group of axes to a random smaller step, of at least half, and keeps random elements in their order."""
    widths = {}
    for group in groups(layout):
        step = int(generator.integers(max(1, group.steps // 2), max(2, group.steps)))
        for name, size in group.at(step).items():
            widths[name] = np.sort(generator.choice(layout.axes[name].size, size, replace=False))
    return widths


def _resize_proof(model: nn.Module, layout: Layout, widths: Mapping[str, np.ndarray], image: torch.Tensor) -> int:
    shrunk = resize(model, layout, widths)
    counted, computed = sum(p.numel() for p in shrunk.parameters()), layout.num_params(widths)
    if counted != computed:
        raise VerificationError(f"resize proof: the layout computes {computed:,} parameters, the shrunk model has {counted:,}")
    if image.dtype == torch.float64:  # activations that wait for gradients are most of what large models need: one sample, single precision
        shrunk, image = shrunk.float(), image.float()
    shrunk.requires_grad_(True)
    try:
        with every_output(shrunk):
            output = shrunk(image[:1])
        flat(output).float().sum().backward()
        shrunk.requires_grad_(False)
        shrunk.zero_grad()
    except MODEL_ERRORS as error:
        raise VerificationError(f"resize proof: the shrunk model does not run: {error}") from error
    return check_runs(shrunk, layout, widths, image)


def check_runs(resized: nn.Module, layout: Layout, widths: Widths, image: torch.Tensor) -> int:
    """Run a resized model once, on a tensor whose data is not looked at, and compare its MACs with the layout's arithmetic.

    Args:
        resized: What `resize` made.
        layout: The layout of the model before.
        widths: The choice.
        image: A batch; only its shape and dtype are used.

    Returns:
        MACs of one sample.

    Raises:
        VerificationError: If the model does not run, or costs something else.
    """
    try:
        counted = count_macs(resized, image)
    except AnalysisError as error:
        raise VerificationError(f"resize proof: the pruned model does not run: {error}") from error
    if counted != layout.macs(widths):
        raise VerificationError(f"resize proof: the layout computes {layout.macs(widths):,} MACs, the pruned model has {counted:,}")
    return counted


def _zeroing_error(model: nn.Module, layout: Layout, widths: Mapping[str, np.ndarray], image: torch.Tensor) -> float | None:
    chosen = {}
    for group in groups(layout):
        if not any(name in layout.normalised for name in group.axes):
            chosen.update({name: widths[name] for name in group.axes})
    chosen = picks(layout, chosen)
    if not chosen:
        return None
    zeroed = copied(model)
    for name, tensor in named_tensors(zeroed):
        mask = _mask(layout, name, chosen)
        if mask is not None and tensor.is_floating_point():
            tensor.mul_(mask.to(tensor.dtype))
    return relative(run_flat(resize(model, layout, chosen).eval(), image), run_flat(zeroed, image))


def _mask(layout: Layout, name: str, chosen: dict[str, np.ndarray]) -> torch.Tensor | None:
    """Ones where every element along every axis is kept, zeros elsewhere, broadcast to the tensor's shape."""
    dims = [parse(text) for text in layout.params[name]]
    mask = None
    for d, term in enumerate(dims):
        if any(axis in chosen for axis in terms.axes(term)):
            keep = torch.zeros(terms.size(term, layout.base_sizes))
            keep[torch.from_numpy(terms.index(term, layout.base_sizes, chosen))] = 1.0
            keep = keep.reshape([-1 if i == d else 1 for i in range(len(dims))])
            mask = keep if mask is None else mask * keep
    return mask

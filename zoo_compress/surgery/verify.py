"""Proof that a layout describes its model: permute, shrink and zero, and compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from .draws import same_draws
from .images import fitting
from .modules import clear_caches, copied, every_output, in_eval_mode, takes_model
from .outputs import tensors_in
from .resize import check_fits, permuted_copy, picks, resize
from .trace import count_macs, input_for, run_traced
from .tracer import MODEL_ERRORS, named_tensors

TOLERANCE = 1e-4
ROUNDING = 1e-5
"""A change that single precision may cause; a larger one is looked at in double precision."""

SMALL = 32
"""Sides of the smallest images that a model is tried with."""


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
@torch.random.fork_rng(devices=[])
def verify(model: nn.Module, layout: Layout, example_input: torch.Tensor | None = None, seed: int = 0) -> Verification:
    """Prove a layout on its model.

    All proofs run on copies with randomised weights and statistics, so that nothing cancels by chance, in double precision where the
    model runs in it. Permutation: every free axis permuted everywhere at once. Resize: every group of axes shrunk at random; the model
    runs forward and backward and has the parameters and MACs the layout computes. Zeroing: axes that nothing normalises across shrunk
    at random give what the whole model gives with the dropped elements zeroed.

    Args:
        model: The model the layout was inferred of. It is not changed.
        layout: From `analyze`.
        example_input: Batch (batch, channels, height, width) whose shape and dtype to use, and if these are no floating-point numbers, its
            values; timm models know theirs.
        seed: Of the random weights, inputs and choices.

    Raises:
        VerificationError: Naming the axis, parameter or count that fails; or if nothing can be proven, because two passes of the model
            differ (it draws random numbers, or keeps a state), or its output does not depend on its weights.
    """
    _check_fits(model, layout)
    generator = np.random.default_rng(seed)
    example = example_input if example_input is not None else input_for(model, layout)
    subject, image, expected = randomised(model, example, seed, double=True)
    _check_proves(subject, image, expected, seed)
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
    example = (example_input if example_input is not None else input_for(model, layout))[:1]
    subject, image, expected = randomised(model, example, seed, double=False)
    change = _permutation_error(subject, layout, _movable(layout), np.random.default_rng(seed), image, expected)
    if change < ROUNDING:
        return change
    subject, image, expected = randomised(model, example, seed, double=True)
    return _permutation_proof(subject, layout, np.random.default_rng(seed), image, expected)


def prove_zeroing(model: nn.Module, layout: Layout, widths: Mapping[str, np.ndarray]) -> float | None:
    """The zeroing proof alone, of one choice of widths, at the least cost: on one sample and on the model's own weights, but for those that
    are all alike (zeros, ones), which would hide what they multiply.

    Args:
        model: The model. It is not changed.
        layout: Its layout.
        widths: Axis → indices kept.

    Returns:
        Relative difference (L2) between the shrunk model and the model whose dropped elements are zeroed instead, over the axes that
        nothing normalises across; None if there is no such axis.

    Raises:
        VerificationError: If they differ, or two passes of the model itself do.
    """
    example = input_for(model, layout)
    generator = torch.Generator().manual_seed(0)
    subject = in_eval_mode(copied(model, {id(p): _varied(p, generator) for p in model.parameters()}))
    for part in _smaller(example):
        try:
            image = fitting(subject, _drawn(part, generator))
            if part.shape[1:] != example.shape[1:]:
                run_flat(subject, image)  # cheap, and what does not run is out before anything is resized
                clear_caches(subject)
            error = _zeroing_error(subject, layout, widths, image)
        except MODEL_ERRORS:  # it runs on images of its own size, or on whole batches, only
            clear_caches(subject)
            continue
        if error is None or error < TOLERANCE:
            return error
        break
    subject, image, expected = randomised(model, example, 0, double=True)
    error = _zeroing_error(subject, layout, widths, image)
    if error is None or error < TOLERANCE:
        return error
    if differs := _two_passes(subject, image, expected):
        raise VerificationError(f"{type(model).__name__} {differs}: what pruning it does cannot be proven. check=False prunes without")
    raise VerificationError(
        f"zeroing proof: the pruned model differs by {error:.3g} (relative) from the model with the same elements zeroed; verify(model, "
        "layout) names the axis where it can, and exclude= leaves one alone"
    )


def _smaller(example: torch.Tensor) -> Iterator[torch.Tensor]:
    """One sample of a batch, first as a small image if it is a large one: what holds of an element holds at every size."""
    if example.ndim == 4 and example.is_floating_point() and min(example.shape[2:]) >= 4 * SMALL:
        yield example[:1, :, : example.shape[2] // 4, : example.shape[3] // 4]
    yield example[:1]


def _alike(tensor: torch.Tensor) -> bool:
    """Whether all elements are the same; a few tell of most tensors that they are not."""
    values = tensor.detach().reshape(-1)
    return all(bool((part == values[0]).all()) for part in (values[:64], values))


@torch.no_grad()
def _varied(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A parameter itself, which no pass changes, or random numbers in its place if its elements are all alike."""
    if parameter.numel() < 2 or not parameter.is_floating_point() or not _alike(parameter):
        return parameter
    new = torch.rand(parameter.shape, generator=generator) * 0.5 + 0.5
    return nn.Parameter((new if parameter.ndim <= 1 else (new - 0.75) * 0.08).to(parameter), requires_grad=False)


def _check_fits(model: nn.Module, layout: Layout) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise VerificationError("the model is TorchScript, of which nothing can be changed or proven: verify the module it was made of")
    try:
        check_fits(model, layout)
    except ValueError as error:
        raise VerificationError(str(error)) from error


def _movable(layout: Layout) -> list[str]:
    return [name for name in layout.free if not layout.axes[name].ordered and layout.axes[name].size > 1]


def randomised(model: nn.Module, example: torch.Tensor, seed: int, *, double: bool) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A randomised copy in eval mode, an input for it and its output; with `double`, in double precision if the model runs in it.

    The input is of the example's shape; random numbers, or where these are none the example itself. A model of less than single
    precision, whose rounding would hide everything, is looked at in single precision if it runs in that.
    """
    generator = torch.Generator().manual_seed(seed)
    image = _drawn(example, generator)
    subject = in_eval_mode(copied(model).cpu()).requires_grad_(False)
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
        _settle(subject, generator, example)
    if double and (parameter is None or parameter.dtype in (torch.float32, torch.float64)):
        precise, exact = copied(subject).double(), image.double() if image.is_floating_point() else image
        try:
            return precise, exact, run_flat(precise, exact)
        except RuntimeError:  # a model that mixes dtypes runs in its own only
            clear_caches(subject)
    if parameter is not None and image.is_floating_point():
        image = image.to(parameter.dtype)
    return subject, image, run_flat(subject, image)


def _drawn(example: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An input of an example's shape: random numbers in single precision, or where it has no floating-point numbers the example itself."""
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator)
    return torch.zeros(example.shape, dtype=example.dtype) if example.is_meta else example.detach().cpu().clone()


def _check_proves(model: nn.Module, image: torch.Tensor, expected: torch.Tensor, seed: int) -> None:
    """Refuse a model of which nothing can be proven by comparing what it gives.

    Raises:
        VerificationError: If two passes differ, or weights change nothing.
    """
    what = type(model).__name__
    if not expected.isfinite().all():
        raise VerificationError(f"{what} computes infinities or NaNs with random weights and inputs: nothing can be compared")
    if differs := _two_passes(model, image, expected):
        raise VerificationError(f"{what} {differs}: nothing can be compared")
    for other in range(1, 4):  # a position, say, may be the same by chance
        changed = copied(model)
        randomise_(changed, torch.Generator().manual_seed(seed + other))
        if not torch.equal(run_flat(changed, image), expected):
            return
    if any(tensor.is_floating_point() and tensor.numel() for tensor in model.parameters()):
        raise VerificationError(
            f"{what} gives the same whatever its weights are, so nothing is proven by that; verify what computes it, such as its backbone"
        )


def _two_passes(model: nn.Module, image: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Why two passes of a model on the same input differ; None if they do not."""

    def again() -> torch.Tensor | None:
        try:
            return run_flat(model, image)
        except MODEL_ERRORS:
            return None

    def agree(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is not None and b is not None and a.shape == b.shape and relative(a, b) < ROUNDING

    if agree(again(), expected):
        return None
    with same_draws():
        first = again()
    with same_draws():
        second = again()
    if agree(second, first):
        return "draws random numbers in eval mode, so that two passes differ"
    return "keeps a state between calls, so that two passes differ; have its forward start anew, or reset it by a hook before every pass"


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


def _settle(model: nn.Module, generator: torch.Generator, example: torch.Tensor) -> None:
    """Move running statistics near those of the random weights: a deep network whose activations grow from layer to layer amplifies the
    rounding of its first until nothing can be told from its output."""
    images = _drawn(example if len(example) > 1 else torch.cat([example, example]), generator)
    images = fitting(model, images)
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
    return torch.cat([(leaf if leaf.layout == torch.strided else leaf.to_dense()).reshape(-1) for leaf in tensors_in(output)])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference (L2) of two tensors."""
    if not expected.is_floating_point():
        found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _permutation_proof(
    model: nn.Module, layout: Layout, generator: np.random.Generator, image: torch.Tensor, expected: torch.Tensor
) -> float:
    movable = _movable(layout)
    if not movable:
        return 0.0
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
    elif not image.is_floating_point():
        shrunk = shrunk.float()
    shrunk.requires_grad_(True)
    try:
        with every_output(shrunk):
            output = shrunk(image[:1])
        total = flat(output).float().sum()
        if total.requires_grad:
            total.backward()
        shrunk.requires_grad_(False)
        shrunk.zero_grad()
    except MODEL_ERRORS as error:
        raise VerificationError(f"resize proof: the shrunk model does not run: {error}") from error
    return check_runs(shrunk, layout, widths, image)


def check_runs(resized: nn.Module, layout: Layout, widths: Widths, image: torch.Tensor) -> int:
    """Run a resized model once and compare its MACs with the layout's arithmetic.

    Where they depend on the values of the input (experts, cascades), there is nothing to compare.

    Args:
        resized: What `resize` made.
        layout: The layout of the model before.
        widths: The choice.
        image: A batch, with data or without.

    Returns:
        MACs of one sample.

    Raises:
        VerificationError: If the model does not run, or costs something else.
    """
    try:
        counted = count_macs(resized, image)
    except AnalysisError as error:
        raise VerificationError(f"resize proof: the pruned model does not run: {error}") from error
    if counted != layout.macs(widths) and not _looks_at_values(resized, image):
        raise VerificationError(f"resize proof: the layout computes {layout.macs(widths):,} MACs, the pruned model has {counted:,}")
    return counted


def _looks_at_values(model: nn.Module, image: torch.Tensor) -> bool:
    """Whether a model does not run on tensors without data."""
    try:
        run_traced(model, image, "meta")
    except MODEL_ERRORS:
        return True
    return False


def _zeroing_error(model: nn.Module, layout: Layout, widths: Mapping[str, np.ndarray], image: torch.Tensor) -> float | None:
    scaled = {str(axis) for text in layout.scales.values() for axis in terms.axes(parse(text))}
    chosen = {}
    for group in groups(layout):
        if not any(name in layout.normalised or name in scaled for name in group.axes):
            chosen.update({name: widths[name] for name in group.axes if name in widths})
    chosen = picks(layout, chosen)
    if not chosen:
        return None
    expected = run_flat(in_eval_mode(resize(model, layout, chosen)), image)
    masks = {name: _mask(layout, name, chosen) for name, tensor in named_tensors(model) if tensor.is_floating_point() and tensor.numel()}
    zeros = {name: mask for name, mask in masks.items() if mask is not None}
    found = _run_zeroed(model, zeros, image)
    if expected.isfinite().all() and not found.isfinite().all():
        # What divides (a step size, a temperature) may not be zeroed: 0 / 0 is no number, and what it divides is zero without.
        error = relative(expected, _run_zeroed(model, _finite(model, zeros, image), image))
        return error if error < TOLERANCE else None  # what divides may be left with something to divide
    return relative(expected, found)


@torch.no_grad()
def _run_zeroed(model: nn.Module, masks: Mapping[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    """What a model gives when some of its tensors are masked."""
    instead: dict[int, torch.Tensor] = {id(parameter): parameter for parameter in model.parameters()}
    for name, tensor in named_tensors(model):
        if name in masks:
            masked = tensor * masks[name].to(tensor)
            instead[id(tensor)] = nn.Parameter(masked, requires_grad=False) if isinstance(tensor, nn.Parameter) else masked
    return run_flat(copied(model, instead), image)


def _finite(model: nn.Module, masks: Mapping[str, torch.Tensor], image: torch.Tensor) -> dict[str, torch.Tensor]:
    """The masks without those by which the model computes infinities or NaNs."""
    left = dict(sorted(masks.items(), key=lambda item: -item[1].numel()))  # of what divides and what is divided, that is the larger
    while not _run_zeroed(model, left, image).isfinite().all():
        names = list(left)
        low, high = 0, len(names)  # with the first `low` masked all is finite, with the first `high` it is not
        while high - low > 1:
            middle = (low + high) // 2
            finite = _run_zeroed(model, {name: left[name] for name in names[:middle]}, image).isfinite().all()
            low, high = (middle, high) if finite else (low, middle)
        role = names[high - 1].rpartition(".")[2]  # tensors of one name tend to have one role
        left = {name: mask for name, mask in left.items() if name.rpartition(".")[2] != role}
    return left


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

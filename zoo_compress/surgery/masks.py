"""Masks over single weights: choosing, applying and packing them. True is a weight, False one that is removed.

In a model a removed weight is +0.0 and nothing else is: a weight that is kept and happens to be zero (some layers start so) is -0.0.
So the weights themselves say what the mask is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CompressError, VariantError
from ..structure.packed import Packing
from .origin import packed_of
from .packing import as_integers, pack_bits, unpack
from .weights import layer_weights

Masks: TypeAlias = dict[str, Tensor]
"""Name of a parameter → booleans of its shape."""


def masks_of(model: nn.Module, names: Iterable[str] | None = None) -> Masks:
    """The masks that a model's weights carry.

    Args:
        model: The model.
        names: Parameters; None takes all weights of convolutions and linear layers.
    """
    return {name: as_integers(model.get_parameter(name)) != 0 for name in (layer_weights(model) if names is None else names)}


def masks_in_force(model: nn.Module, names: Iterable[str]) -> Masks:
    """What is left of some parameters: all of them, zeros too, where the model says nothing of a mask."""
    known = {name for name, packing in packed_of(model).items() if packing.mask}
    return {name: mask if name in known else torch.ones_like(mask) for name, mask in masks_of(model, names).items()}


@torch.no_grad()
def apply_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Remove weights, in place: they become +0.0, and no others are.

    Raises:
        CompressError: If the masks are of another architecture; the model is then as it was.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise CompressError(f"mask {name!r}: {type(model).__name__} has no such parameter: the masks are of another architecture")
        if mask.shape != parameters[name].shape or mask.dtype != torch.bool:
            expected, found = (f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (parameters[name] != 0, mask))
            raise CompressError(f"mask {name!r}: expected {expected}, found {found}: the masks are of another architecture")
    for name, mask in masks.items():
        mask_(parameters[name], mask)


@torch.no_grad()
def mask_(weight: Tensor, mask: Tensor) -> None:
    """Remove elements of one tensor, in place."""
    mask = mask.to(weight.device)
    # Not a product: that of a negative weight with 0 is -0.0.
    weight.copy_(torch.where(mask, torch.where(weight == 0, -torch.zeros_like(weight), weight), torch.zeros_like(weight)))


def density(masks: Mapping[str, Tensor]) -> float:
    """Fraction of the masked parameters' elements that are kept."""
    return remaining(masks) / sum(mask.numel() for mask in masks.values())


def remaining(masks: Mapping[str, Tensor]) -> int:
    """How many weights are kept."""
    return sum(int(mask.sum()) for mask in masks.values())


def best(scores: Tensor, count: int) -> Tensor:
    """Booleans (n,): the `count` highest of some scores (n,); of equal ones the first, of -inf none.

    Raises:
        CompressError: If a score is not a number.
    """
    if bool(scores.isnan().any()):
        raise CompressError("scores: expected numbers, found NaN: are the model's weights finite?")
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    if count > 0:
        least = scores.kthvalue(len(scores) - min(count, len(scores)) + 1).values
        chosen = scores > least
        chosen[(scores == least).nonzero()[: count - int(chosen.sum()), 0]] = True
    return chosen & (scores > -torch.inf)


def keep_best(scores: Mapping[str, Tensor], density: float, scope: str = "global", within: Mapping[str, Tensor] | None = None) -> Masks:
    """Masks of the highest scores.

    Args:
        scores: Name → scores of a parameter's elements.
        density: Fraction of the elements to keep.
        scope: `global` ranks all together, `local` keeps the same fraction of each parameter (at least one element).
        within: Masks whose removed elements stay removed. A parameter with fewer left than its fraction keeps these, and others don't make
            up for it: in the local scope fewer may be kept than `density` says.
    """
    if scope == "local":
        return {
            name: best(_alive(score, name, within), max(1, round(density * score.numel()))).view(score.shape)
            for name, score in scores.items()
        }
    flat = torch.cat([_alive(score, name, within) for name, score in scores.items()])
    return _split(best(flat, max(1, round(density * len(flat)))), scores)


def remove_fraction(
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    fraction: float,
    *,
    scope: str = "local",
    other: Mapping[str, float] | None = None,
) -> Masks:
    """Masks without a fraction of the *remaining* elements, those of the lowest scores (Frankle & Carbin 2019, section 2).

    Args:
        masks: What remains so far.
        scores: Name → scores of a parameter's elements.
        fraction: How much of what remains to remove, 0 to 1.
        scope: `local` removes it from each parameter, `global` from all together.
        other: Name → another fraction, for single parameters (the output layer) in the local scope.

    Raises:
        CompressError: If a fraction is out of range.
    """
    other = dict(other or {})
    for value in (fraction, *other.values()):
        if not 0 <= value < 1:
            raise CompressError(f"fraction: expected 0 up to 1 of the remaining weights, found {value!r}")
    if scope == "global":
        count = remaining(masks) - round(fraction * remaining(masks))
        return _split(best(torch.cat([_alive(scores[name], name, masks) for name in masks]), count), masks)
    out = {}
    for name, mask in masks.items():
        left = int(mask.sum())
        out[name] = best(_alive(scores[name], name, masks), left - round(other.get(name, fraction) * left)).view(mask.shape)
    return out


def random_like(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """Random masks that keep as many elements of each parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: best(torch.rand(mask.numel(), generator=generator), int(mask.sum())).view(mask.shape).to(mask.device)
        for name, mask in masks.items()
    }


def pack_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks as tensors for a file, one bit an element."""
    out = {}
    for name, mask in masks.items():
        out[f"{name}.shape"] = torch.tensor(mask.shape, dtype=torch.int64)
        out[f"{name}.mask"] = torch.from_numpy(pack_bits(mask.cpu().numpy().ravel()))
    return out


def unpack_masks(state: Mapping[str, Tensor], where: str) -> Masks:
    """The masks that `pack_masks` got.

    Raises:
        VariantError: If they are none, or damaged.
    """
    names = [name.removesuffix(".mask") for name in state if name.endswith(".mask")]
    if len(state) != 2 * len(names):
        raise VariantError(f"{where}: expected a shape and a mask of each parameter, found {len(state)} tensors with {len(names)} masks")
    one = torch.ones(1)
    out = {}
    for name in names:
        parts = {part: state[f"{name}.{part}"] for part in ("mask", "shape") if f"{name}.{part}" in state}
        kept = int(np.unpackbits(parts["mask"].numpy()).sum()) if parts["mask"].dtype == torch.uint8 else 0
        out[name] = unpack({**parts, "values": one.expand(kept)}, Packing(mask=True), f"{where}: mask of {name!r}") != 0
    return out


def _alive(scores: Tensor, name: str, within: Mapping[str, Tensor] | None) -> Tensor:
    """Scores (n,), below all others where an element is removed already."""
    flat = scores.flatten()
    return flat if within is None or name not in within else torch.where(within[name].flatten().to(flat.device), flat, -torch.inf)


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> Masks:
    sizes = [tensor.numel() for tensor in like.values()]
    return {name: part.view(like[name].shape) for name, part in zip(like, flat.split(sizes), strict=True)}

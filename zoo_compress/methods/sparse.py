"""Sparse networks: single weights of convolutions and linear layers are removed, those that matter least.

Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks. Criteria: see `saliency`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ..errors import CompressError
from ..structure.packed import Packing
from ..surgery.masks import Masks, apply_, masks_in_force
from ..surgery.masks import density as density_of
from ..surgery.modules import copied, takes_model
from ..surgery.origin import stamp_packed
from ..surgery.patterns import check_pattern, keep_n_of_m, keep_units
from ..surgery.weights import classifiers, layer_weights, transposed, turned
from ..training.config import Count
from ..training.task import ChangeConfig
from .criteria import Data
from .saliency import lookup, saliency

_logger = logging.getLogger(__name__)

SCOPES = ("global", "local")


@dataclass(frozen=True)
class Sparsity:
    """Which weights to remove; see `sparsify` for what each of these is."""

    density: float | None = None
    pattern: str | None = None
    scope: str = "global"
    criterion: str = "magnitude"
    rounds: int | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        blocks = check_pattern(self.pattern)
        if blocks is None and not _fraction(self.density):
            raise CompressError(f"density: expected the fraction of weights to keep, above 0 and below 1, found {self.density!r}")
        if blocks is not None and self.density is not None:
            raise CompressError(f"density: expected none beside pattern {self.pattern!r}, which says it, found {self.density!r}")
        if self.scope not in SCOPES:
            raise CompressError(f"scope: expected {' or '.join(SCOPES)}, found {self.scope!r}")
        if self.rounds is not None and (isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1):
            raise CompressError(f"rounds: expected a positive integer, found {self.rounds!r}")
        lookup(self.criterion)

    @property
    def num_rounds(self) -> int:
        """In how many rounds weights are removed."""
        return 1 if self.density is None else self.rounds or lookup(self.criterion).rounds


@takes_model
def sparsify(
    model: nn.Module,
    *,
    density: float | None = None,
    pattern: str | None = None,
    scope: str = "global",
    criterion: str = "magnitude",
    rounds: int | None = None,
    exclude: Iterable[str] = (),
    data: Data | None = None,
    seed: int = 0,
) -> nn.Module:
    """A copy of a model with the least important weights of convolutions and linear layers removed: they are zero.

    Nothing is trained. Fine-tuning by this package's loop keeps the zeros, in a loop of your own `zoo_compress.keep_packed` does. Saving
    stores the weights that are left, and one bit for each place. Layers that standardise their weights before they use them (nfnet's,
    BiT's) store zeros and compute with other numbers: `exclude` them.

    Args:
        model: The model. It is not changed. Compressed models too; what is removed already stays so.
        density: Fraction of these weights to keep, above 0 and below 1.
        pattern: None removes weights one by one. `kernel` removes the whole kernels of single inputs of a convolution, `channel` all
            weights of an output (but no classes). `N:M`, such as `2:4`, keeps N of every M weights that follow each other along the
            inputs, and takes no density; layers whose inputs are no multiple of M stay as they are.
        scope: `global` ranks all weights together, which may leave none of a layer (a warning says so); `local` keeps the same fraction
            of each. A layer of a sparse model that has fewer left keeps those: the density is then below the one asked for.
        criterion: `magnitude`, `random`, `synflow`; with data `snip`, `grasp`, `gradient`, `obd`. See `saliency.SALIENCIES`.
        rounds: In how many rounds to remove them, scores being worked out anew for what is left; 1 unless given, for synflow 100.
        exclude: Patterns of parameter names to leave alone. The classifier is not, unless it is named here.
        data: Batches of (images (batch, channels, height, width), class indices (batch,)) for criteria that look at data.
        seed: For the random criterion.

    Returns:
        A new model, `<architecture>__sparse`.

    Raises:
        CompressError: If an argument is out of range, no weight matches, or the model has fewer weights left than are to be kept.
    """
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    wanted = Sparsity(density, pattern, scope, criterion, rounds, exclude)
    subject = copied(model)
    masks = choose_masks(subject, wanted, data, seed)
    if empty := [name for name, mask in masks.items() if not mask.any()]:
        _logger.warning("sparsify: no weight is left of %s; scope='local' keeps some of every layer", ", ".join(empty))
    apply_(subject, masks)
    stamp_packed(subject, "sparse", dict.fromkeys(masks, Packing(mask=True)))
    return subject


def choose_masks(model: nn.Module, wanted: Sparsity, data: Data | None = None, seed: int = 0) -> Masks:
    """The masks that `sparsify` would apply. The model is not changed.

    Raises:
        CompressError: As `sparsify` does.
    """
    weights = layer_weights(model, wanted.exclude)
    if wanted.pattern == "channel":
        weights = {name: weight for name, weight in weights.items() if name not in classifiers(model)}
    masks = masks_in_force(model, weights)
    left = density_of(masks)
    if wanted.density is not None and wanted.density >= left:
        raise CompressError(f"density: expected less than the {left:.4g} that is left of the model's weights, found {wanted.density!r}")
    try:
        batches = list(data) if data is not None else None
    except (TypeError, ValueError, RuntimeError) as error:
        raise CompressError(f"data: expected batches of (images, class indices): {error}") from error
    # Patterns are about outputs and inputs, in this order.
    groups = transposed(model) if wanted.pattern is not None else {}
    subject, rounds = model, wanted.num_rounds
    for number in range(1, rounds + 1):
        scores = saliency(subject, weights, wanted.criterion, batches, seed, masks)
        masks = _turned(_chosen(_turned(scores, groups), wanted, _turned(masks, groups), left, number / rounds), groups)
        if number < rounds:
            subject = copied(model)
            apply_(subject, masks)
            weights = {name: subject.get_parameter(name) for name in masks}
    return masks


def _chosen(scores: dict[str, Tensor], wanted: Sparsity, masks: Masks, left: float, part: float) -> Masks:
    blocks = check_pattern(wanted.pattern)
    if blocks is not None:
        return keep_n_of_m(scores, *blocks, masks)
    assert wanted.density is not None
    return keep_units(scores, left * (wanted.density / left) ** part, wanted.scope, wanted.pattern, masks)


def _turned(tensors: dict[str, Tensor], groups: dict[str, int]) -> dict[str, Tensor]:
    return {name: turned(tensor, groups[name]) if name in groups else tensor for name, tensor in tensors.items()}


def _fraction(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1


class SparsifyConfig(ChangeConfig):
    """Remove single weights; see `sparsify` for what the settings are."""

    noun = "sparsifying"
    kind: Literal["sparsify"] = "sparsify"
    density: Annotated[float, Field(gt=0, lt=1)] | None = None
    pattern: str | None = None
    scope: Literal["global", "local"] = "global"
    criterion: str = "magnitude"
    rounds: Count | None = None
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @field_validator("criterion")
    @classmethod
    def _known_criterion(cls, name: str) -> str:
        lookup(name)
        return name

    @model_validator(mode="after")
    def _consistent(self) -> SparsifyConfig:
        _ = self.wanted
        return self

    @property
    def wanted(self) -> Sparsity:
        """The same, checked."""
        return Sparsity(self.density, self.pattern, self.scope, self.criterion, self.rounds, self.exclude)

    def apply(self, model: nn.Module, images: Iterable[object], seed: int) -> nn.Module:
        settings = self.model_dump(exclude={"kind", "calibration_batches"})
        return sparsify(model, **settings, data=images if lookup(self.criterion).statistic else None, seed=seed)  # type: ignore[arg-type]

    def rehearse(self, model: nn.Module, images: Iterable[object], seed: int) -> nn.Module:
        return self.model_copy(update={"criterion": "magnitude", "rounds": 1}).apply(model, images, seed)

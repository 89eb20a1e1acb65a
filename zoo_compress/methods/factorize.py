"""Low rank: layers as products of two, with ranks from one budget over all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import nn

from ..errors import CompressError
from ..structure.layout import Layout
from ..surgery.factorise import BUDGETS, FactorPlan, Wanted, apply_factors, plan_factors
from ..surgery.modules import takes_model
from ..training.config import Count, Positive
from ..training.task import ChangeConfig

SCHEMES: dict[str, tuple[str, ...]] = {
    "auto": ("svd", "spatial", "channel"),
    "svd": ("svd",),
    "spatial": ("svd", "spatial"),
    "channel": ("svd", "channel"),
}
"""What k×k convolutions become: k×1 and 1×k (spatial), k×k and 1×1 (channel), whichever loses less, or nothing (svd)."""


class FactorizeConfig(ChangeConfig):
    """Replace layers by two of lower rank each; see `factorize` for what is not said here.

    Attributes:
        data: fit what layers give on calibration batches, not their weights.
    """

    noun = "factorising"
    kind: Literal["factorize"] = "factorize"
    macs: Positive | None = None
    params: Positive | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    scheme: Literal["auto", "svd", "spatial", "channel"] = "auto"
    data: bool = False
    scope: Literal["global", "local"] = "global"
    round_to: Count = 8
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()  # not JSON any more once the stage's name was put inside

    @model_validator(mode="after")
    def _one_budget(self) -> FactorizeConfig:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(BUDGETS)}, found {' and '.join(given) or 'none'}")
        return self

    def apply(self, model: nn.Module, images: Iterable[object], seed: int) -> nn.Module:
        return factorize(
            model,
            macs=self.macs,
            params=self.params,
            energy=self.energy,
            scheme=self.scheme,
            data=images if self.data else None,
            scope=self.scope,
            round_to=self.round_to,
            exclude=self.exclude,
            seed=seed,
        )

    def rehearse(self, model: nn.Module, images: Iterable[object], seed: int) -> nn.Module | None:
        if self.energy is None:
            self.model_copy(update={"data": False}).apply(model, images, seed)
        return None  # which layers become two depends on their weights


@takes_model
def plan_factorize(
    model: nn.Module,
    *,
    macs: float | None = None,
    params: float | None = None,
    energy: float | None = None,
    scheme: str = "auto",
    data: Iterable[object] | None = None,
    scope: str = "global",
    round_to: int = 8,
    exclude: Iterable[str] = (),
    layout: Layout | None = None,
    seed: int = 0,
) -> FactorPlan:
    """What `factorize` would do, with what each layer keeps, and why layers are left as they are. See there for arguments and errors."""
    given = {name: value for name, value in zip(BUDGETS, (macs, params, energy), strict=True) if value is not None}
    if len(given) != 1:
        raise CompressError(f"factorize: expected exactly one of macs, params and energy, found {' and '.join(given) or 'none'}")
    if scheme not in SCHEMES:
        raise CompressError(f"factorize: scheme: expected one of {', '.join(SCHEMES)}, found {scheme!r}")
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    wanted = Wanted("lowrank", SCHEMES[scheme], next(iter(given.items())), scope, round_to, exclude=exclude)
    return plan_factors(model, wanted, data, layout, seed)


@takes_model
def factorize(
    model: nn.Module,
    *,
    macs: float | None = None,
    params: float | None = None,
    energy: float | None = None,
    scheme: str = "auto",
    data: Iterable[object] | None = None,
    scope: str = "global",
    round_to: int = 8,
    exclude: Iterable[str] = (),
    layout: Layout | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replace linear layers and convolutions by two of lower rank each, until the model fits a budget. Nothing is trained.

    Linear layers and 1×1 convolutions by singular value decomposition; k×k convolutions as k×1 and 1×k (Jaderberg et al. 2014) or as k×k
    and 1×1 (Zhang et al. 2016). Each is left as it is where two would not be cheaper, where the budget is better met in other layers, or
    where the model does not bear it, which a run shows; `plan_factorize` says which and why.

    Args:
        model: A model that timm's factory made, pruned or not. It is not changed.
        macs, params: The budget: a fraction to keep, or a count above 1.
        energy: Instead of one, the least share of its energy (squared singular values) that every layer keeps, in (0, 1].
        scheme: What k×k convolutions become: `spatial`, `channel`, `auto` (whichever loses less) or `svd` (they stay).
        data: Batches of images, or of tuples that begin with one, preprocessed as the model wants them; a few hundred images without
            labels do. What is kept is then the output of layers on these images, as far as the predictions depend on it, and means are
            restored. Without, it is the weights.
        scope: `global` takes from the layers that lose least; `local`, the same fraction of every layer's rank.
        round_to: Preferred multiple for ranks; layers with few take smaller powers of two.
        exclude: Patterns of names of layers to leave alone.
        layout: The model's layout, if it is known already.
        seed: Of the positions that are looked at in images.

    Returns:
        A new model, `<arch>__lowrank`, within 2 percentage points of the budget. Ranks are axes of its layout: it can be pruned.

    Raises:
        CompressError: On bad arguments, if no layer can be two, or if no ranks come near the budget.
    """
    plan = plan_factorize(
        model,
        macs=macs,
        params=params,
        energy=energy,
        scheme=scheme,
        data=data,
        scope=scope,
        round_to=round_to,
        exclude=exclude,
        layout=layout,
        seed=seed,
    )
    return apply_factors(model, plan)

"""Depthwise-separable convolutions in place of dense ones, fitted by least squares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import nn

from ..errors import CompressError
from ..structure.layout import Layout
from ..surgery.factorise import FactorPlan, Wanted, apply_factors, plan_factors
from ..surgery.modules import takes_model
from ..training.config import Count, Positive
from ..training.task import ChangeConfig


class SeparateConfig(ChangeConfig):
    """Replace dense convolutions by depthwise and pointwise ones; see `separate` for what is not said here.

    Attributes:
        data: fit what layers give on calibration batches, not their weights.
    """

    noun = "separating"
    kind: Literal["separate"] = "separate"
    macs: Positive | None = None
    params: Positive | None = None
    multiplier: Count = 1
    data: bool = False
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()  # not JSON any more once the stage's name was put inside

    @model_validator(mode="after")
    def _one_budget(self) -> SeparateConfig:
        if self.macs is not None and self.params is not None:
            raise ValueError("expected macs or params, or neither to replace all dense convolutions, found both")
        return self

    def apply(self, model: nn.Module, images: Iterable[object], seed: int) -> nn.Module:
        data = images if self.data else None
        return separate(model, macs=self.macs, params=self.params, multiplier=self.multiplier, data=data, exclude=self.exclude, seed=seed)

    def rehearse(self, model: nn.Module, images: Iterable[object], seed: int) -> nn.Module | None:
        found = self.model_copy(update={"data": False}).apply(model, images, seed)
        return found if self.macs is None and self.params is None else None  # which layers become two depends on their weights


@takes_model
def plan_separate(
    model: nn.Module,
    *,
    macs: float | None = None,
    params: float | None = None,
    multiplier: int = 1,
    data: Iterable[object] | None = None,
    exclude: Iterable[str] = (),
    layout: Layout | None = None,
    seed: int = 0,
) -> FactorPlan:
    """What `separate` would do, with what each layer keeps, and why layers are left as they are. See there for arguments and errors."""
    given = {name: value for name, value in (("macs", macs), ("params", params)) if value is not None}
    if len(given) > 1:
        raise CompressError("separate: expected macs or params, or neither to replace all dense convolutions, found both")
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    wanted = Wanted("separable", ("separable",), next(iter(given.items()), None), ranks=(multiplier,), exclude=exclude)
    return plan_factors(model, wanted, data, layout, seed)


@takes_model
def separate(
    model: nn.Module,
    *,
    macs: float | None = None,
    params: float | None = None,
    multiplier: int = 1,
    data: Iterable[object] | None = None,
    exclude: Iterable[str] = (),
    layout: Layout | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replace dense k×k convolutions by depthwise k×k and pointwise ones (Howard et al. 2017, MobileNets), fitted and not trained.

    No weights of a network that was trained with dense convolutions come near in such few parameters: fine-tune or distil afterwards.

    Args:
        model: A model that timm's factory made, pruned or not. It is not changed.
        macs, params: How much to keep, a fraction or a count above 1: convolutions that lose least are replaced first. Without either,
            all are.
        multiplier: Depthwise filters per input channel.
        data: As for `factorize`. Without data the fit to the weights is exactly the best; with data, least squares in turns.
        exclude: Patterns of names of layers to leave alone.
        layout: The model's layout, if it is known already.
        seed: Of the positions that are looked at in images.

    Returns:
        A new model, `<arch>__separable`.

    Raises:
        CompressError: On bad arguments, if there is nothing to replace, or if no choice comes within 2 percentage points of the budget.
    """
    plan = plan_separate(model, macs=macs, params=params, multiplier=multiplier, data=data, exclude=exclude, layout=layout, seed=seed)
    return apply_factors(model, plan)

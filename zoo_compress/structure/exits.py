"""Early exits as data: where they are, what their heads read, when a sample leaves; and thresholds for a budget of MACs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ..errors import CompressError

Format = Literal["NC", "NCL", "NLC", "NCHW", "NHWC"]
"""Dimensions of what an exit reads, in timm's letters."""
MAPS: tuple[Format, ...] = ("NCHW", "NHWC")
Confidence = Literal["max_softmax", "entropy", "margin"]
CONFIDENCES: tuple[str, ...] = get_args(Confidence)

MAX_EXITS = 256
MAX_GRID = 16

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Exit(BaseModel):
    """One early exit.

    Attributes:
        place: Module whose output the head reads.
        leaf: Which tensor of that output, where it is a tuple, list or dict.
        format: Dimensions of that tensor.
        pool: `mean` over all positions, or the `first` one (a class token).
        grid: Into so many parts each side of a map is divided before the mean of each part is taken (Kaya et al. 2019, Shallow-Deep
            Networks, section 4: what an early layer sees where is most of what it knows); 1 takes the mean of the whole.
        features: Elements along its channel dimension, in the base.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    place: Annotated[str, StringConstraints(pattern=r"^\w+(\.\w+)*$", max_length=512)]
    leaf: Annotated[int, Field(ge=0, lt=64)] = 0
    format: Format
    pool: Literal["mean", "first"] = "mean"
    grid: Annotated[int, Field(ge=1, le=MAX_GRID)] = 1
    features: Annotated[int, Field(ge=1, le=2**24)]

    @model_validator(mode="after")
    def _first_of_a_sequence(self) -> Exit:
        if self.pool == "first" and self.format != "NLC":
            raise ValueError(f"pool 'first' takes a class token of a sequence (NLC), found format {self.format}")
        if self.grid > 1 and self.format not in MAPS:
            raise ValueError(f"grid: expected 1 where there is no map, found {self.grid} in format {self.format}")
        return self


class Exits(BaseModel):
    """The early exits of a network, in the order they are reached.

    Attributes:
        places: One entry an exit.
        thresholds: Confidence at which a sample leaves, for each exit; None at an exit nobody leaves by. No thresholds before `calibrate`.
        confidence: What the thresholds measure.
        truncated: The network ends at its only exit; what came after is not there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    places: Annotated[tuple[Exit, ...], Field(strict=False, min_length=1, max_length=MAX_EXITS)]
    thresholds: Annotated[tuple[Fraction | None, ...], Field(strict=False, max_length=MAX_EXITS)] | None = None
    confidence: Confidence = "max_softmax"
    truncated: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Exits:
        names = [exit.place for exit in self.places]
        if len(set(names)) != len(names):
            raise ValueError(f"places: each at most once, found {', '.join(names)}")
        if self.thresholds is not None and len(self.thresholds) != len(names):
            raise ValueError(f"thresholds: expected {len(names)}, one an exit, found {len(self.thresholds)}")
        if self.truncated and (len(names) != 1 or self.thresholds is not None):
            raise ValueError("truncated: expected one exit and no thresholds")
        return self


@dataclass(frozen=True)
class Calibration:
    """Thresholds for a budget, and what they do to the samples they were found on.

    Attributes:
        thresholds: One an exit; None where nobody leaves.
        fractions: Fraction of the samples that leaves at each exit, and last that which stays to the end.
        macs: Average MACs of a sample, heads included.
        budget: What was asked for, in MACs.
    """

    thresholds: tuple[float | None, ...]
    fractions: tuple[float, ...]
    macs: float
    budget: float


def budgeted(confidences: np.ndarray, costs: Sequence[float], budget: float) -> Calibration:
    """Thresholds such that the average cost is a budget: budgeted batch classification of MSDNet (Huang et al. 2018, section 3).

    A sample that reaches an exit leaves there with the same probability everywhere, so the fraction q_k that leaves at exit k is in
    proportion to p ** k. The one p is found for which the average cost is the budget; each threshold is then the confidence that the wanted
    number of the samples still there reaches.

    Args:
        confidences: (samples, exits), each in 0…1.
        costs: Of a sample that leaves at each exit, and last of one that stays; ascending.
        budget: The average cost wanted, in the same unit.

    Raises:
        CompressError: If the budget lies outside what is between leaving at the first exit and staying to the end.
    """
    cost = np.asarray(costs, dtype=np.float64)
    samples, exits = confidences.shape
    if not cost[0] <= budget <= cost[-1]:
        raise CompressError(
            f"budget: no threshold reaches {budget:,.0f} MACs on average; expected {cost[0]:,.0f} (all leave at the first exit) to "
            f"{cost[-1]:,.0f} (all stay, past every head)"
        )
    wanted = np.round(np.cumsum(_shares(cost, budget)) * samples).astype(int)
    here = np.arange(samples)
    thresholds: list[float | None] = []
    fractions = []
    for k in range(exits):
        found = confidences[here, k]
        leaving = min(max(wanted[k] - (samples - len(here)), 0), len(here))
        threshold = float(np.sort(found)[::-1][leaving - 1]) if leaving else None
        stays = found < threshold if threshold is not None else np.ones(len(here), dtype=bool)
        fractions.append(float((~stays).sum() / samples))
        thresholds.append(threshold)
        here = here[stays]
    fractions.append(len(here) / samples)
    return Calibration(tuple(thresholds), tuple(fractions), float(np.dot(fractions, cost)), float(budget))


def _shares(cost: np.ndarray, budget: float) -> np.ndarray:
    """q_k in proportion to p ** k with the p that meets the budget. Cost rises with p, so bisection on log p finds it."""
    power = np.arange(len(cost))

    def shares(log_p: float) -> np.ndarray:
        exponent = power * log_p
        weights = np.exp(exponent - exponent.max())
        return weights / weights.sum()

    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle) @ cost < budget else (low, middle)
    return shares((low + high) / 2)

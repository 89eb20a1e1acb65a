"""Factorised layers as data: which layer is two now, how, and of which rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["svd", "spatial", "channel", "separable"]
KINDS: tuple[str, ...] = get_args(Kind)

FIRST, SECOND = "0", "1"
"""Names of the two layers within the one they replace: `layer1.0.conv1.0.weight`."""


class Factor(BaseModel):
    """How one layer was replaced by two.

    Attributes:
        kind: `svd`, a linear layer or 1×1 convolution as two; `spatial`, a k×k convolution as k×1 and 1×k (Jaderberg et al. 2014, Speeding
            up Convolutional Neural Networks with Low Rank Expansions, scheme 2); `channel`, as k×k and 1×1 (Zhang et al. 2016,
            Accelerating Very Deep Convolutional Networks); `separable`, as depthwise k×k and 1×1.
        rank: Channels between the two; in a separable one, per input channel (the depth multiplier).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Kind
    rank: Annotated[int, Field(ge=1, le=2**24)]


@dataclass(frozen=True)
class LayerShape:
    """What of a dense layer its factors follow from.

    Attributes:
        outputs: Output channels or features.
        inputs: Input channels or features.
        kernel: Height and width of the kernel; empty for a linear layer.
    """

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()

    @property
    def columns(self) -> int:
        """Elements that one output is computed of."""
        return self.inputs * math.prod(self.kernel)

    def kinds(self) -> tuple[str, ...]:
        """The kinds there are for such a layer."""
        if math.prod(self.kernel) == 1:
            return ("svd",)
        return ("spatial", "channel", "separable") if min(self.kernel) > 1 else ("channel", "separable")

    def full_rank(self, kind: str) -> int:
        """The rank from which on the two layers can compute whatever the one does."""
        if kind == "spatial":
            return min(self.inputs * self.kernel[0], self.outputs * self.kernel[1])
        if kind == "separable":
            return min(self.outputs, math.prod(self.kernel))
        return min(self.columns, self.outputs)

    def weights(self, kind: str) -> tuple[int, int]:
        """Elements of the two weights, per rank."""
        if kind == "spatial":
            return self.inputs * self.kernel[0], self.outputs * self.kernel[1]
        if kind == "separable":
            return self.columns, self.inputs * self.outputs
        return self.columns, self.outputs

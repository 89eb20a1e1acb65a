"""The stored record of weights that take fewer bits than their number of elements: which zeros and which shared values a model keeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_BITS = 8

Bits = Annotated[int, Field(ge=1, le=MAX_BITS)]


class Packing(BaseModel):
    """What holds for the elements of one parameter. A checkpoint then stores it packed, where that is smaller; training keeps it.

    Attributes:
        mask: Elements that are +0.0 are removed: they are no weights any more.
        bits: The others are members of at most 2^bits clusters, each of one value. None where every weight has its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mask: bool = False
    bits: Bits | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Packing:
        if not self.mask and self.bits is None:
            raise ValueError("expected a mask, bits or both, found neither")
        return self

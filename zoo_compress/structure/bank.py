"""The stored record of a bank: what an elastic network knows about its widths, beside the structure of its whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from . import terms
from .layout import Layout, parse
from .stored import MAX_ENTRIES, AxisName, Size, TermText, Width

MAX_CHOICES = 1024
MAX_LINKED = 2**18
"""Links times choices: each link is worked out for each choice."""

# JSON has no tuples: lists stand for them.
Cost = Annotated[tuple[TermText, Annotated[int, Field(ge=1)]], Field(strict=False)]
Link = Annotated[tuple[TermText, TermText], Field(strict=False)]
Costs = Annotated[tuple[Cost, ...], Field(strict=False, max_length=MAX_ENTRIES)]


class Choice(BaseModel):
    """One choice of widths that a bank keeps normalisation statistics for.

    Attributes:
        sizes: Axis → its size, for every axis of the bank.
        width: The fraction that chose them; None where each axis was chosen by itself.
        affine: It has scales and shifts of its own too, in the layers that keep statistics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sizes: dict[AxisName, Size] = Field(max_length=MAX_ENTRIES)
    width: Width | None = None
    affine: bool = False


class Bank(BaseModel):
    """What runs at many widths.

    Attributes:
        widths: The fractions that the network is meant to run at, ascending.
        universal: It runs at any width between the least and the greatest of them; otherwise at these, each with norms of its own.
        round_to: Preferred multiple for sizes, as in pruning.
        ordered: Axes whose order matters.
        links: Pairs of terms whose sizes must stay equal.
        macs_terms: See `Layout`.
        fused_macs_terms: See `Layout`.
        input_shape: Shape of the batch that these costs are of.
        choices: The widths that statistics are known for, beside the whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    widths: Annotated[tuple[Width, ...], Field(strict=False, min_length=1, max_length=MAX_CHOICES)]
    universal: bool = False
    round_to: Size = 8
    ordered: Annotated[tuple[AxisName, ...], Field(strict=False, max_length=MAX_ENTRIES)] = ()
    links: Annotated[tuple[Link, ...], Field(strict=False, max_length=MAX_ENTRIES)] = ()
    macs_terms: Costs = ()
    fused_macs_terms: Costs = ()
    input_shape: Annotated[tuple[Size, ...], Field(strict=False, min_length=1, max_length=8)]
    choices: Annotated[tuple[Choice, ...], Field(strict=False, max_length=MAX_CHOICES)] = ()

    @field_validator("widths")
    @classmethod
    def _ascend(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if list(widths) != sorted(set(widths)):
            raise ValueError(f"expected widths that ascend, found {widths}")
        return widths

    def terms(self) -> Iterator[str]:
        """Every term in the record."""
        for pair in self.links:
            yield from pair
        for text, _ in (*self.macs_terms, *self.fused_macs_terms):
            yield text

    def check(self, sizes: Mapping[str, int]) -> None:
        """Check that it is about the axes of the whole and stays within them.

        Raises:
            ValueError: Naming what is not.
        """
        for name in self.ordered:
            if name not in sizes:
                raise ValueError(f"bank.ordered: axis {name!r} has no entry in sizes")
        if len({tuple(sorted(choice.sizes.items())) for choice in self.choices}) < len(self.choices):
            raise ValueError("bank.choices: expected each choice of sizes once")
        links = [(left, right, parse(left), parse(right)) for left, right in sorted(set(self.links))]
        if len(links) * len(self.choices) > MAX_LINKED:
            raise ValueError(f"bank.links: expected at most {MAX_LINKED // len(self.choices)} for so many choices, found {len(links)}")
        for i, choice in enumerate(self.choices):
            if choice.sizes.keys() != sizes.keys():
                name = min(choice.sizes.keys() ^ sizes.keys())
                raise ValueError(f"bank.choices.{i}.sizes: expected the axes of the bank, found a difference at {name!r}")
            wide = next((name for name, size in choice.sizes.items() if size > sizes[name]), None)
            if wide is not None:
                raise ValueError(f"bank.choices.{i}.sizes: expected at most {sizes[wide]} for {wide!r}, found {choice.sizes[wide]}")
            for left, right, *sides in links:
                a, b = (terms.size(side, choice.sizes) for side in sides)
                if a != b:
                    raise ValueError(f"bank.choices.{i}.sizes: linked sizes differ: {left!r} is {a} and {right!r} is {b}")


def bank(layout: Layout, widths: tuple[float, ...], *, universal: bool, round_to: int) -> Bank:
    """The record of a bank without choices, of a layout as `Layout.settled` writes it."""
    return Bank(
        widths=widths,
        universal=universal,
        round_to=round_to,
        ordered=tuple(name for name in layout.free if layout.axes[name].ordered),
        links=layout.links,
        macs_terms=layout.macs_terms,
        fused_macs_terms=layout.fused_macs_terms,
        input_shape=layout.input_shape,
    )

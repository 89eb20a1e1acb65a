"""Slimmable networks: one bank of weights whose width is one number.

Yu et al. 2019, Slimmable Neural Networks: at a few widths, each with normalisation of its own; `methods.slim` trains them. Yu & Huang 2019,
Universally Slimmable Networks and Improved Training Techniques: at any width, with statistics found afterwards; `methods.us`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..errors import CompressError, WidthError
from ..profiling.settings import Adjustable, Fitted, Value, ways
from ..structure.bank import Bank, Choice, bank
from ..structure.layout import Layout
from ..structure.variant import record
from ..structure.widths import groups, uniform
from ..surgery.elastic import Elastic, make_elastic_, unchanged_on_error
from ..surgery.exits import ExitsModel
from ..surgery.modules import takes_model
from ..surgery.origin import origin, refuse_packed, stamp
from ..surgery.resize import check_fits
from ..surgery.trace import analyze

WIDTHS = (0.25, 0.5, 0.75, 1.0)
"""Those of the first paper."""


class Slimmable(Elastic, Adjustable):
    """A network whose width is one number. See `Elastic` for what it is made of."""

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths it is meant to run at, ascending: fractions of every axis that may change."""
        return self._bank.widths

    @property
    def round_to(self) -> int:
        """Preferred multiple for sizes."""
        return self._bank.round_to

    @property
    def universal(self) -> bool:
        """Whether it runs at any width between the least and the greatest."""
        return self._bank.universal

    def set_width(self, width: float) -> None:
        """Choose a width. Nothing is copied.

        Args:
            width: One of `widths`, or any between the least and the greatest of a universal network.

        Raises:
            WidthError: If it is neither.
        """
        self._choose(self.sizes_at(width)[0])

    def sizes_at(self, width: float | Mapping[str, int]) -> tuple[dict[str, int], float | None]:
        if isinstance(width, Mapping):
            return super().sizes_at(width)
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not math.isfinite(width):
            raise WidthError(f"width: expected a number in (0, 1], found {width!r}")
        known = any(width == w for w in self.widths) or any(width == choice.width for choice in self.choices)
        if not known and not (self.universal and self.widths[0] <= width <= self.widths[-1]):
            expected = f"between {self.widths[0]:g} and {self.widths[-1]:g}" if self.universal else "one of " + _listed(self.widths)
            raise WidthError(f"width: expected {expected}, found {width!r}")
        sizes = self._elastic.known
        if width not in sizes:
            sizes[width] = {**self.layout.base_sizes, **uniform(self.groups, width, self.round_to)}
        return sizes[width], float(width)

    def knobs(self) -> dict[str, tuple[Value, ...]]:
        """The widths that it can be evaluated at, beside what other knobs it has."""
        known = {*self.widths, *(choice.width for choice in self.choices if choice.width is not None)}
        return {"width": tuple(width for width in sorted(known) if self._calibrated(self.sizes_at(width)[0])), **super().knobs()}

    def chosen(self) -> dict[str, Any]:
        return {"width": self.sizes, **super().chosen()}

    def fit(self, latency_ms: float, **options: Any) -> Fitted:
        """See `Adjustable.fit`. Copies of the weights at the chosen width are kept from then on, which saves their time in every pass.

        Whoever then changes weights by way of `tensor.data`, of which torch keeps no count, has to set the width again.
        """
        self._elastic.keep = True
        return super().fit(latency_ms, **options)

    def ways(self) -> dict[str, nn.Module]:
        """A model of its own for every width, the widest first, and of each every way it runs in."""
        found = {}
        for width in self.widths[::-1]:
            for label, model in ways(self.export(width)).items():
                found[f"×{width:g} {label}".rstrip()] = model
        return found

    def export(self, width: float | Mapping[str, int] | None = None, exit: int | None = None) -> nn.Module:
        """A model of its own with one width, with equal outputs to the bit. It saves and reloads as a pruned one.

        Args:
            width: A fraction, or axis → size; None takes the chosen width.
            exit: Of a network with early exits: where it ends, as for `export` of such a network. None keeps them all.

        Raises:
            WidthError: If the network does not run at that width.
            CompressError: If it was never calibrated at it, or has no such exit.
        """
        if exit is not None and not isinstance(self, ExitsModel):
            raise CompressError(f"exit: expected none, {type(self).__name__} has no early exits, found {exit!r}")
        before = self.sizes
        if width is not None:
            self.set_widths(self.sizes_at(width)[0])
        try:
            static: Any = self.static()
            return static if exit is None else static.export(exit)
        finally:
            self.set_widths(before)

    def add_choice(self, choice: Choice, own: Mapping[str, Tensor] | None = None) -> None:
        super().add_choice(choice, own)
        self.stamp()

    def stamp(self) -> None:
        """Write down what the network is where timm's saving looks for it; nothing happens to a model that is not timm's."""
        source = origin(self)
        if source is not None:
            noted = self._bank.model_copy(update={"choices": self.choices})
            made = {"method": "slim", "base": source.base, "base_args": source.args, "previous": source.previous, "bank": noted}
            stamp(self, record(self.layout, self.layout.base_sizes, **made))  # type: ignore[arg-type]

    @property
    def _bank(self) -> Bank:
        return self._elastic.settings


@takes_model
def slim(
    model: nn.Module,
    widths: Sequence[float] = WIDTHS,
    *,
    universal: bool = False,
    round_to: int = 8,
    layout: Layout | None = None,
) -> Slimmable:
    """Make a model slimmable, in place: its parameters become the bank.

    Args:
        model: A model; pruned ones too.
        widths: Fractions of every axis that may change, in (0, 1]. Each but the widest gets normalisation of its own, which starts as the
            bank's.
        universal: Let it run at any width between the least and the greatest; scales and shifts of normalisation are then shared, and
            statistics are found afterwards for the widths asked for, by `zoo_compress.calibrate`.
        round_to: Preferred multiple for sizes, as in pruning.
        layout: The model's layout, if it is known already.

    Returns:
        The same model, which is now a `Slimmable` as well. It runs at the widest of `widths`.

    Raises:
        CompressError: If a width is out of (0, 1], two of them come to the same sizes, or no axis of the model may change.
    """
    chosen = _checked(widths, round_to)
    refuse_packed(model, "slim")
    layout = analyze(model) if layout is None else layout
    check_fits(model, layout)
    movable = groups(layout)
    if not movable:
        reasons = sorted({axis.frozen for axis in layout.axes.values() if axis.frozen})
        raise CompressError(f"slim: no axis of {type(model).__name__} may change ({'; '.join(reasons[:3]) or 'it has none'})")
    layout = layout.settled()
    sizes = {width: {**layout.base_sizes, **uniform(movable, width, round_to)} for width in chosen}
    for narrow, wide in pairwise(chosen):
        if sizes[narrow] == sizes[wide]:
            raise CompressError(f"slim: widths {narrow:g} and {wide:g} come to the same sizes with round_to={round_to}; leave one out")
    noted = bank(layout, chosen, universal=universal, round_to=round_to)
    kept = [Choice(sizes=sizes[width], width=width, affine=width != chosen[-1]) for width in (chosen[-1:] if universal else chosen)]
    with unchanged_on_error(model):
        return restore_slimmable_(model, layout, noted.model_copy(update={"choices": tuple(kept)}))


def restore_slimmable_(model: nn.Module, layout: Layout, noted: Bank) -> Slimmable:
    """Make a model the slimmable network that a record describes, in place. Tensors of its choices start as the bank's; load others."""
    net = make_elastic_(model, layout, Slimmable, noted)
    for choice in noted.choices:
        Elastic.add_choice(net, choice)
    net.stamp()
    net.set_width(net.widths[-1])
    return net


def slimmed(model: nn.Module, widths: Sequence[float], *, universal: bool = False, round_to: int = 8) -> Slimmable:
    """What `slim` makes; a network that it has made already, as long as it is the same.

    Raises:
        CompressError: If the network runs at other widths, or is universal where that is not wanted, or the other way round.
    """
    if not isinstance(model, Slimmable):
        return slim(model, widths, universal=universal, round_to=round_to)
    if model.widths != _checked(widths, round_to) or model.universal != universal:
        own, other = ("a universal network" if kind else "a network" for kind in (model.universal, universal))
        found = f"{other} of {_listed(widths)}" if own != other else _listed(widths)
        raise CompressError(f"slim: expected the widths of the model, {own} of {_listed(model.widths)}, found {found}")
    return model


def _checked(widths: Sequence[float], round_to: int) -> tuple[float, ...]:
    if isinstance(widths, (str, Mapping)) or not isinstance(widths, Sequence) or not widths:
        raise CompressError(f"slim: expected a list of widths such as {WIDTHS}, found {widths!r}")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width <= 1:
            raise CompressError(f"slim: expected widths in (0, 1], found {width!r}")
    if len(set(widths)) != len(widths):
        raise CompressError(f"slim: expected different widths, found {_listed(widths)}")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise CompressError(f"slim: round_to is a positive integer, found {round_to!r}")
    return tuple(sorted(map(float, widths)))


def _listed(widths: Sequence[float]) -> str:
    return ", ".join(f"{width:g}" for width in widths)

"""Numbers that scale: which of them are attention's own scale, the inverse square root of the width that queries and keys share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..structure import unify as u
from ..structure.terms import Term, product
from .sizes import Computed, Setting, expression, origins, plain

if TYPE_CHECKING:
    from .tracer import Tracer

_ADD = {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__", "rsub"}
_MULTIPLY = {"mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"}
_DIVIDE = {"div", "div_", "divide", "divide_", "true_divide", "true_divide_", "__truediv__", "__itruediv__"}
ARITHMETIC = _ADD | _MULTIPLY | _DIVIDE
_CARRY = {
    *("view", "reshape", "transpose", "t", "permute", "swapaxes", "movedim", "flatten", "unflatten", "unsqueeze", "squeeze", "expand"),
    *("contiguous", "clone", "chunk", "split", "unbind", "__getitem__", "to", "float", "type_as", "roll"),
    *("Tensor.mT", "Tensor.T", "Tensor.mH"),
}
"""Functions whose result holds the values they were given, elsewhere."""


@dataclass
class Use:
    """A number that a function multiplied a tensor with, or was given as it is.

    Attributes:
        number: The number.
        divides: Whether the function divided by it.
        widths: The widths over which products of two activations were summed that it scaled.
    """

    number: Computed
    divides: bool = False
    widths: list[Term] = field(default_factory=list)

    @property
    def value(self) -> float:
        """What the product was multiplied with."""
        return 1 / plain(self.number) if self.divides else plain(self.number)

    def fits(self) -> bool:
        """Whether the number is the inverse square root of every width it scaled products over."""
        return bool(self.widths) and all(u.variables(w) and abs(self.value - u.size_of(w) ** -0.5) < 1e-9 for w in self.widths)

    def recomputed(self, tracer: Tracer) -> bool:
        """Whether the model's code computes that inverse square root anew, from the width itself or from what always equals it: the
        residual width over the number of heads."""
        if not self.fits() or self.number.power is None:
            return False
        size, exponent = self.number.power
        whole, less, parts = expression(size)
        if less != 0 or exponent != (0.5 if self.divides else -0.5):
            return False
        return all(tracer.always_equal(whole, product(parts, width)) for width in self.widths)


class Scales:
    """What the numbers of one run scaled.

    Attributes:
        found: Float attribute → the head width whose inverse square root it holds.
        uses: What numbers were used for.
        products: Widths over which products of two activations were summed, in order.
        unscaled: (path, module, width) of fused attentions that were given no scale.
        disproven: Attributes that are used for something else when the model runs in another way.
    """

    def __init__(self) -> None:
        self.found: dict[str, Term] = {}
        self.uses: list[Use] = []
        self.products: list[Term] = []
        self.disproven: set[str] = set()
        self.unscaled: list[tuple[str, torch.nn.Module, Term]] = []

    def follow(self, name: str, numbers: Iterable[Any], tensors: list[torch.Tensor], out: Any, before: int) -> None:
        """A function has run.

        Args:
            name: Of the function.
            numbers: Those it was given that nobody accounts for.
            tensors: Those it was given.
            out: What it gave.
            before: How many products there were before.
        """
        made = self.products[before:]
        given: list[Use] = [use for tensor in tensors for use in getattr(tensor, "_zc_scaled", ())]
        for use in given if made else ():
            use.widths += made
        summed = made or next((p for tensor in tensors if (p := getattr(tensor, "_zc_product", None))), [])
        scaling = [Use(number, name in _DIVIDE) for number in numbers]
        self.uses += scaling
        multiplies = name in _MULTIPLY | _DIVIDE and len(tensors) == 1
        if multiplies and not made:
            for use in scaling:
                use.widths += summed
        if not (made or multiplies or (name in _CARRY and (given or summed))):
            return
        for tensor in [out] if isinstance(out, torch.Tensor) else out if isinstance(out, (tuple, list)) else ():
            if isinstance(tensor, torch.Tensor):
                tensor._zc_product = summed  # type: ignore[attr-defined]
                tensor._zc_scaled = [] if summed else [*given, *(scaling if multiplies else ())]  # type: ignore[attr-defined]

    def attends(self, query: torch.Tensor, width: Term, scale: Any, inside: tuple[str, torch.nn.Module] | None) -> None:
        """A fused attention has run over heads of a width, with a scale, or None for its own."""
        for use in getattr(query, "_zc_scaled", ()):
            use.widths.append(width)
        if isinstance(scale, Computed):
            self.uses.append(Use(scale, widths=[width]))
        elif scale is None and inside is not None:
            self.unscaled.append((*inside, width))

    def settle(self, tracer: Tracer) -> None:
        """Sort what was seen: attributes that are scales, and numbers computed from widths that are none, whose widths are kept."""
        settings: dict[str, list[Use]] = {}
        for use in self.uses:
            if isinstance(use.number, Setting):
                settings.setdefault(use.number.path, []).append(use)
            elif not use.recomputed(tracer):
                tracer.keep(origins(use.number), "values are scaled by a number that the model's code computes from it")
            else:
                tracer.mixed += use.widths  # a pruned model computes another scale: removing elements differs from zeroing them
        for path, uses in settings.items():
            widths = [width for use in uses if use.fits() for width in use.widths]
            if widths and all(use.fits() for use in uses):
                self.found[path] = widths[0]
                for width in widths:
                    tracer.link(widths[0], width)
            else:
                for width in widths:
                    u.freeze(width, f"{path} is the scale of an attention over it, and used for something else")
        for path, (_, width) in self.unused().items():
            if path not in self.disproven:
                self.found[path] = width

    def unused(self) -> dict[str, tuple[str, Term]]:
        """Float attributes that hold the inverse square root of a head width, in modules whose attention takes none: path of the module
        and the width. They may be what the same module multiplies with where it does not call the fused function, or equal by chance."""
        used = {use.number.path for use in self.uses if isinstance(use.number, Setting)}
        return {
            value.path: (inside, width)
            for inside, module, width in self.unscaled
            for value in vars(module).values()
            if isinstance(value, Setting) and value.path not in used and abs(plain(value) - u.size_of(width) ** -0.5) < 1e-9
        }

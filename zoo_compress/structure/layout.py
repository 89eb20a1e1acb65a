"""The layout of a model: every dimension of every parameter in named axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ..errors import WidthError
from . import terms
from .cost import Polynomial

Widths: TypeAlias = Mapping[str, "int | Sequence[int] | np.ndarray"]
"""A choice of widths: axis → its new size (the first elements stay), or the indices kept, in their new order."""

T = TypeVar("T")

parse = lru_cache(maxsize=65536)(terms.parse)


@dataclass(frozen=True, slots=True)
class Axis:
    """One named axis.

    Attributes:
        size: Number of elements in the analysed model.
        frozen: Why it may not change, in words a user can act on; None if it may.
        ordered: Its order matters (a convolution runs along it, or it is the output of a model without classifier): it can be pruned,
            not permuted.
    """

    size: int
    frozen: str | None = None
    ordered: bool = False


@dataclass(frozen=True)
class Layout:
    """What a model is made of. An invariant of the model; what a method decides is a choice of widths beside it.

    Attributes:
        params: Parameter or buffer name → one term per dimension.
        axes: Axis name → `Axis`.
        attributes: `module.path.attr` (`attr[i]` in a tuple) → the term whose size it holds.
        scales: `module.path.attr` → the term `t` of a float attribute that holds size(t) ** -0.5, the scale that
            `scaled_dot_product_attention` takes from the head width when it is given none.
        links: Pairs of terms whose sizes must stay equal although their elements are unrelated.
        macs_terms: (term, count) pairs; multiply-accumulates of the samples of the traced batch, each run alone, are the sum of
            count × size(term). (What a batch pays only once, a sample alone pays too.)
        fused_macs_terms: The same for the products inside fused attention.
        input_shape: Shape of that batch, (batch, channels, height, width).
        outputs: One term per dimension of each tensor that the model gave for it.
        trained: Names in `params` that are parameters; the others are buffers.
        normalised: Axes whose elements influence each other (a mean, norm or softmax runs over them, or a sum of what need not be zero
            for an element whose weights are), so that removing elements differs from zeroing them.
        unknown: Operations met that have no rule → how often.
        untrained: Why the model did not run in training mode, where what only that reaches or gives was therefore not seen.
        example: The batch itself, a tensor, with or without data: what later runs of the model are given.
    """

    params: dict[str, tuple[str, ...]]
    axes: dict[str, Axis]
    attributes: dict[str, str] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)
    links: tuple[tuple[str, str], ...] = ()
    macs_terms: tuple[tuple[str, int], ...] = ()
    fused_macs_terms: tuple[tuple[str, int], ...] = ()
    input_shape: tuple[int, ...] = (1,)
    outputs: tuple[tuple[str, ...], ...] = ()
    trained: frozenset[str] = frozenset()
    normalised: frozenset[str] = frozenset()
    unknown: dict[str, int] = field(default_factory=dict)
    untrained: str | None = None
    example: Any = field(default=None, compare=False, repr=False)

    @property
    def batch(self) -> int:
        """Number of samples in the traced batch."""
        return self.input_shape[0]

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the axes that may change."""
        return tuple(name for name, axis in self.axes.items() if axis.frozen is None)

    def moves(self, name: str) -> bool:
        """Whether a free axis runs along a parameter or buffer."""
        return any(self.axes[axis].frozen is None for dim in self.params[name] for axis in terms.axes(parse(dim)))

    @property
    def free_share(self) -> float:
        """Share of the parameters that a free axis runs along, in 0…1."""
        sizes = {name: math.prod(terms.size(parse(dim), self.base_sizes) for dim in self.params[name]) for name in self.trained}
        return sum(size for name, size in sizes.items() if self.moves(name)) / max(sum(sizes.values()), 1)

    def part(self, path: str) -> Layout:
        """What the layout says of the tensors and numbers of one module, by their names in it; an empty path is the whole model.

        Its costs, links, inputs and outputs are those of the whole, and are left out.
        """
        if not path:
            return self
        prefix = f"{path}."

        def inside(entries: Mapping[str, T]) -> dict[str, T]:
            return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}

        params, attributes, scales = inside(self.params), inside(self.attributes), inside(self.scales)
        texts = (*(dim for dims in params.values() for dim in dims), *attributes.values(), *scales.values())
        used = {str(axis) for text in texts for axis in terms.axes(parse(text))}
        return Layout(
            params=params,
            axes={name: axis for name, axis in self.axes.items() if name in used},
            attributes=attributes,
            scales=scales,
            trained=frozenset(name.removeprefix(prefix) for name in self.trained if name.startswith(prefix)),
            normalised=self.normalised & used,
        )

    def settled(self) -> Layout:
        """The same layout with a number in place of every axis that may not change."""

        def written(text: str) -> str:
            return str(terms.substitute(parse(text), lambda name: name if self.axes[name].frozen is None else self.axes[name].size))

        def varying(texts: Mapping[str, str]) -> dict[str, str]:
            return {path: text for path, old in texts.items() if not (text := written(old)).isdigit()}

        links = ((written(a), written(b)) for a, b in self.links)
        return replace(
            self,
            params={name: tuple(map(written, dims)) for name, dims in self.params.items()},
            axes={name: self.axes[name] for name in self.free},
            attributes=varying(self.attributes),
            scales=varying(self.scales),
            links=tuple((a, b) for a, b in links if not (a.isdigit() and b.isdigit())),
            macs_terms=tuple((written(term), count) for term, count in self.macs_terms),
            fused_macs_terms=tuple((written(term), count) for term, count in self.fused_macs_terms),
            outputs=tuple(tuple(map(written, dims)) for dims in self.outputs),
            normalised=self.normalised & set(self.free),
            example=None,
        )

    @cached_property
    def base_sizes(self) -> dict[str, int]:
        """Axis → size in the analysed model."""
        return {name: axis.size for name, axis in self.axes.items()}

    @cached_property
    def macs_polynomial(self) -> Polynomial:
        """Multiply-accumulates of the traced batch, without those inside fused attention, as a polynomial in the sizes of axes."""
        return Polynomial(((parse(t), n) for t, n in self.macs_terms), tuple(self.axes))

    @cached_property
    def fused_macs_polynomial(self) -> Polynomial:
        """Multiply-accumulates inside fused attention of the traced batch as a polynomial in the sizes of axes."""
        return Polynomial(((parse(t), n) for t, n in self.fused_macs_terms), tuple(self.axes))

    @cached_property
    def params_polynomial(self) -> Polynomial:
        """Number of parameters as a polynomial in the sizes of axes."""
        dims = (terms.product(*map(parse, self.params[name])) for name in self.trained)
        return Polynomial(((term, 1) for term in dims), tuple(self.axes))

    def macs(self, widths: Widths | None = None, *, fused_attention: bool = True) -> int:
        """Multiply-accumulates of one sample alone (convolutions, matrix products, attention) at a choice of widths.

        Args:
            widths: The choice; the analysed model's own without it.
            fused_attention: Count the two products inside `scaled_dot_product_attention`. FLOP counters disagree about them:
                `torch.utils.flop_counter` does where it runs on a GPU and does not on a CPU.
        """
        sizes = self.sizes(widths)
        fused = self.fused_macs_polynomial(sizes) if fused_attention else 0
        return (self.macs_polynomial(sizes) + fused) // self.batch

    def num_params(self, widths: Widths | None = None) -> int:
        """Number of parameters (buffers not counted) at a choice of widths."""
        return self.params_polynomial(self.sizes(widths))

    def sizes(self, widths: Widths | None = None) -> dict[str, int]:
        """Size of every axis at a choice of widths; axes that `widths` does not name keep theirs.

        Raises:
            WidthError: If an axis is unknown or frozen, a size is no positive integer, or indices repeat or lie outside the axis.
        """
        chosen = dict(self.base_sizes)
        for name, width in (widths or {}).items():
            chosen[name] = self._size(name, width)
        return chosen

    def _size(self, name: str, width: int | Sequence[int] | np.ndarray) -> int:
        axis = self.axes.get(name)
        if axis is None:
            raise WidthError(f"axis {name!r}: not in this layout; its axes are {_some(self.axes)}")
        if isinstance(width, (int, np.integer)) and not isinstance(width, bool):
            indices, chosen = None, int(width)
        else:
            indices = np.asarray(width)
            if indices.ndim != 1 or indices.dtype.kind not in "iu":
                raise WidthError(f"axis {name!r}: expected a size or a list of indices, found {width!r}")
            chosen = len(indices)
        if axis.frozen is not None and (chosen != axis.size or (indices is not None and (indices != np.arange(axis.size)).any())):
            raise WidthError(f"axis {name!r} may not change: {axis.frozen}")
        if indices is not None and (len(np.unique(indices)) != len(indices) or (indices < 0).any() or (indices >= axis.size).any()):
            raise WidthError(f"axis {name!r}: indices must be distinct and in 0…{axis.size - 1}, found {width!r}")
        if axis.ordered and indices is not None and (np.diff(indices) < 0).any():
            raise WidthError(f"axis {name!r} is ordered: indices must ascend, found {width!r}")
        if chosen < 1:
            raise WidthError(f"axis {name!r}: expected a size of at least 1, found {chosen}")
        return chosen

    def check_links(self, widths: Widths | None = None) -> None:
        """Check that linked terms have equal sizes.

        Raises:
            WidthError: Naming the link that a choice of widths breaks.
        """
        sizes = self.sizes(widths)
        for left, right in self.links:
            a, b = terms.size(parse(left), sizes), terms.size(parse(right), sizes)
            if a != b:
                raise WidthError(f"linked sizes differ: {left!r} is {a} and {right!r} is {b}; choose widths that keep them equal")

    def __str__(self) -> str:
        width = max(map(len, self.params), default=0)
        lines = [f"{name:<{width}}  {_show(dims)}" for name, dims in self.params.items() if name in self.trained]
        buffers = [f"{name:<{width}}  {_show(dims)}" for name, dims in self.params.items() if name not in self.trained and dims]
        lines += ["", "buffers", *buffers] if buffers else []
        lines += ["", "axes"]
        for name, axis in self.axes.items():
            note = f"frozen: {axis.frozen}" if axis.frozen else "ordered" if axis.ordered else ""
            lines.append(f"  {name:<8}{axis.size:>6}  {note}".rstrip())
        # Layers describe their own weights in attributes too; those say nothing new.
        told = [path for path in self.attributes if f"{path.rpartition('.')[0]}.weight" not in self.params]
        if told or self.scales:
            lines += ["", "attributes"]
            lines += [f"  {path} = {self.attributes[path]}" for path in told]
            lines += [f"  {path} = ({term}) ** -0.5" for path, term in self.scales.items()]
        if self.links:
            lines += ["", "links (equal in size only)", *(f"  {a} ~ {b}" for a, b in self.links)]
        if self.unknown:
            lines += ["", "operations without a rule", *(f"  {name} × {count}" for name, count in self.unknown.items())]
        lines += ["", f"{len(self.free)} of {len(self.axes)} axes free, {self.num_params():,} parameters, {self.macs():,} MACs"]
        return "\n".join(lines)


def _show(dims: tuple[str, ...]) -> str:
    return " ".join(d if d.isdigit() else f'"{d}"' for d in dims) or "(scalar)"


def _some(names: Mapping[str, object], limit: int = 8) -> str:
    listed = ", ".join(list(names)[:limit])
    return listed + (", …" if len(names) > limit else "")

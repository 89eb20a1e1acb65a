"""Proof that rows can leave a batch where a module ends: let them, and see whether the model still runs and gives the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import AnalysisError
from .kernels import Kernels
from .modules import eval_copy
from .rows import Boundary, Carrier, Visitor, run, select, set_taps
from .tracer import MODEL_ERRORS
from .verify import randomise_

TOLERANCE = 1e-3
"""Change of logits, relative to how much they differ between samples (L2), that rounding may cause."""


@dataclass(frozen=True)
class Proof:
    """Where rows can leave among some places of a model.

    Attributes:
        boundaries: How, for each place; None where they cannot: other tensors of the batch, or its size as a number, are used later.
        shapes: Shape of every leaf of each place's output, without the first dimension.
        output: Shape of the model's output, without the first dimension.
    """

    boundaries: tuple[Boundary | None, ...]
    shapes: tuple[list[tuple[int, ...]], ...]
    output: tuple[int, ...]


class Trial:
    """Tries where rows can leave a model's batch.

    A copy without data runs on a batch that gets smaller at each place. Batch sizes are primes that divide no other size: whatever still
    has an earlier batch size, or was told it, then meets a tensor it does not fit, and the run ends in an error, which no broadcasting can
    hide. A second run leaves a single sample. Where samples have several rows, a run on random weights must also give the logits that the
    samples get in the whole batch.

    Args:
        model: The model.
        example: A batch; only its shape, without the first dimension, and dtype are used.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        self.model, self.example = model, example
        self._copies: dict[str, nn.Module] = {}
        self._kernels = Kernels()
        self._alone: dict[str, str | None] = {}

    def prove(self, places: Sequence[str]) -> Proof:
        """Find out at which of these places rows can leave, all in one forward pass.

        Args:
            places: Names of modules, in the order they run.

        Raises:
            AnalysisError: If one is no place for an exit: samples are no rows of what it gives, or it does not run once, in this order.
        """
        try:
            return self._prove(places, [True] * len(places))
        except AnalysisError:
            leaving = [self.stays(place) is None for place in places]
        while True:
            try:
                return self._prove(places, leaving)
            except AnalysisError:
                if not any(leaving):
                    raise
                leaving[len(places) - 1 - leaving[::-1].index(True)] = False  # each alone is fine, and together they are not

    def stays(self, place: str) -> str | None:
        """Why rows cannot leave where a module ends; None where they can."""
        if place not in self._alone:
            try:
                self._prove([place], [True])
                self._alone[place] = None
            except AnalysisError as error:
                self._alone[place] = str(error)
        return self._alone[place]

    def _prove(self, places: Sequence[str], leaving: Sequence[bool]) -> Proof:
        failures = []
        for device, least in (("meta", 101), ("cpu", 11)):  # a model that looks at values needs real tensors
            try:
                shrink = _Shrink(_falling(_primes(sum(leaving) + 1, least), leaving))
                shape = self._run(device, places, shrink)
                self._run(device, places, _Shrink(_falling([2] + [1] * sum(leaving), leaving), shrink.boundaries))
            except AnalysisError:
                raise
            except MODEL_ERRORS as error:
                failures.append(error)
                if not _needs_data(error):
                    break
            else:
                found = [shrink.boundaries[i] if leaves else None for i, leaves in enumerate(leaving)]
                if any(carrier.rows > 1 for boundary in found if boundary for carrier in boundary.carriers):
                    self._compare(places, found)
                return Proof(tuple(found), tuple(shrink.shapes[i] for i in range(len(places))), shape)
        why = f"{type(failures[-1]).__name__}: {' '.join(str(failures[-1]).split())[:200]}"
        raise AnalysisError(f"with fewer rows from there on, the model fails: {why}") from failures[-1]

    def _run(self, device: str, places: Sequence[str], shrink: _Shrink) -> tuple[int, ...]:
        if device not in self._copies:
            self._copies[device] = eval_copy(self.model, device)
        clone = self._copies[device]
        image = torch.zeros((shrink.sizes[0], *self.example.shape[1:]), dtype=self.example.dtype, device=device)
        set_taps(clone, places)
        with self._kernels, torch.no_grad():
            output = run(clone, shrink, image)
        if len(shrink.boundaries) < len(places):
            raise AnalysisError(f"{places[len(shrink.boundaries)]!r} does not run in a forward pass")
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            raise AnalysisError(f"expected a model whose output is (batch, classes), found {_shape(output)}")
        if output.shape[0] != shrink.sizes[-1]:
            raise AnalysisError(f"the model gives {output.shape[0]} rows for {shrink.sizes[-1]} samples that stay")
        return tuple(output.shape[1:])

    def _compare(self, places: Sequence[str], boundaries: Sequence[Boundary | None]) -> None:
        """Let one sample, not the first or last, leave at each place, on random weights; the others must get what they get without."""
        if any(tensor.is_meta for tensor in self.model.parameters()):
            raise AnalysisError("samples have several rows there, and without weights nothing tells which are whose")
        failure: Exception
        # Random weights may give logits that hardly depend on the image; double precision still sees how. A model that mixes dtypes runs
        # in its own only.
        for dtype in (torch.float64, self.example.dtype):
            generator = torch.Generator().manual_seed(0)
            clone = eval_copy(self.model, "cpu").requires_grad_(False)
            randomise_(clone, generator)
            leave = sum(boundary is not None for boundary in boundaries)
            image = torch.randn((leave + 2, *self.example.shape[1:]), generator=generator)
            set_taps(clone, places)
            try:
                change = _change(clone.to(dtype), boundaries, image.to(dtype))
            except MODEL_ERRORS as error:
                if isinstance(error, AnalysisError):
                    raise
                failure = error
                continue
            if not change < TOLERANCE:
                raise AnalysisError(f"samples that stay after others left get other logits ({change:.2g} of how much samples differ)")
            return
        raise AnalysisError(f"no comparison can tell whether samples get the same logits: {failure}") from failure


def _change(model: nn.Module, boundaries: Sequence[Boundary | None], image: torch.Tensor) -> float:
    """How much logits change where others leave, relative to how much they differ between samples (L2)."""
    with torch.no_grad():
        whole = run(model, None, image)
        part = run(model, _LeaveOne(boundaries), image.clone())
    differ = float((whole - whole.mean(0)).norm())
    if not differ > 1e3 * torch.finfo(whole.dtype).eps * float(whole.norm()):
        raise AnalysisError("with random weights, the model's logits do not depend on the image: no comparison can tell")
    return float((part - whole[[0, -1]]).norm()) / differ


class _LeaveOne(Visitor):
    """Sends away the second sample at each tap where samples leave."""

    def __init__(self, boundaries: Sequence[Boundary | None]) -> None:
        self.boundaries = boundaries
        self.there = 2 + sum(boundary is not None for boundary in boundaries)

    def at(self, index: int, output: Any) -> Any:
        boundary = self.boundaries[index]
        if boundary is None:
            return None
        stay = torch.tensor([0, *range(2, self.there)])
        self.there -= 1
        return select(output, boundary, stay)


class _Shrink(Visitor):
    """Keeps the first rows of a batch at each tap, and finds out what carries the batch there.

    Args:
        sizes: Samples before the first tap, between taps, and after the last.
        known: How to select rows, where that is known already.
    """

    def __init__(self, sizes: Sequence[int], known: Mapping[int, Boundary] | None = None) -> None:
        self.sizes, self.known = sizes, known
        self.boundaries: dict[int, Boundary] = {}
        self.shapes: dict[int, list[tuple[int, ...]]] = {}

    def at(self, index: int, output: Any) -> Any:
        if index in self.boundaries:
            raise AnalysisError("it runs more than once in a forward pass")
        if index != len(self.boundaries):
            raise AnalysisError("it does not run after the exit before it")
        now, then = self.sizes[index], self.sizes[index + 1]
        leaves = tree_leaves(output)
        found = self.known[index] if self.known else Boundary(tuple(_carriers(leaves, now)))
        if not any(carrier.rows == 1 for carrier in found.carriers):
            raise AnalysisError(f"samples are no rows of what it gives ({', '.join(map(_shape, leaves)) or 'nothing'})")
        self.boundaries[index] = found
        self.shapes[index] = [tuple(leaf.shape)[1:] if isinstance(leaf, torch.Tensor) else () for leaf in leaves]
        if now == then:
            return None
        device = next(leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
        return select(output, found, torch.arange(then, device=device))


def _carriers(leaves: Sequence[Any], samples: int) -> Iterator[Carrier]:
    for i, leaf in enumerate(leaves):
        size = leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf
        if type(size) is int and size > 0 and size % samples == 0:
            yield Carrier(i, size // samples)


def _falling(sizes: Sequence[int], leaving: Sequence[bool]) -> list[int]:
    """Samples before each place and after the last, when the next of these sizes is left wherever rows leave."""
    rest = iter(sizes)
    found = [next(rest)]
    for leaves in leaving:
        found.append(next(rest) if leaves else found[-1])
    return found


def _shape(leaf: Any) -> str:
    return "×".join(map(str, leaf.shape)) if isinstance(leaf, torch.Tensor) else type(leaf).__name__


def _needs_data(error: Exception) -> bool:
    """Whether an error says that a tensor without data was asked for its values."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


def _primes(count: int, least: int) -> list[int]:
    """Descending primes, the smallest from `least` on."""
    found: list[int] = []
    number = least
    while len(found) < count:
        if all(number % d for d in range(2, int(number**0.5) + 1)):
            found.append(number)
        number += 2
    return found[::-1]

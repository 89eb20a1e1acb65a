"""Latency as a polynomial in the sizes of axes, fitted to measured passes of the model at many widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..structure import terms
from ..structure.cost import Polynomial, monomials
from ..structure.layout import Layout, parse
from ..structure.terms import Term
from ..structure.widths import Group
from ..surgery.resize import resize
from . import latency

DESIGNS = 10
"""Random choices of widths that are measured."""

LEVELS = 6
"""Sizes of every group to choose from at random, if it has as many."""

AT_ONCE = 4
"""Designs kept in memory, and timed in turns."""

MOST_FEATURES = 4
"""Unknowns of one layer's time at most: a constant, its MACs, what it reads and what it writes."""

RUNS = (2, 30)
"""Timed passes of each design, at least and at most."""

NANOSECONDS = 1e9


def fit_latency(
    model: nn.Module, layout: Layout, groups: Sequence[Group], image: torch.Tensor, *, seconds: float, progress: tqdm
) -> Polynomial:
    """Find out how a model's latency depends on its widths. To be called within `latency.inference`.

    A pass falls into segments, each from the start of one module with parameters to the start of the next, so that what a module's
    functions without parameters take (activations, pooling, additions, attention) counts with the layer before. The time of a segment is
    taken to be a constant, plus shares proportional to the number of weights (its MACs), and to the size of each dimension (what it
    reads and writes); none is negative. Their medians over runs at random widths give these shares by least squares.

    Args:
        model: The model.
        layout: Its layout.
        groups: Axes that may change.
        image: A batch.
        seconds: About how long to measure; within the limits of `RUNS`.
        progress: Advanced by one for each design.

    Returns:
        Nanoseconds of one pass.
    """
    generator = np.random.default_rng(0)
    designs = [layout.base_sizes] + [layout.sizes(_random_widths(groups, generator)) for _ in range(DESIGNS)]
    times = []
    for start in range(0, len(designs), AT_ONCE):
        chunk = designs[start : start + AT_ONCE]
        paths, measured = _times([resize(model, layout, sizes) for sizes in chunk], image, seconds * len(chunk) / len(designs))
        times += measured
        progress.update(len(chunk))
    found: list[tuple[Term, float]] = []
    for path, column in zip(paths, np.array(times).T, strict=True):
        features = _features(layout, path)
        values = np.array([[terms.size(term, sizes) for term in features] for sizes in designs], dtype=np.float64)
        found += zip(features, NANOSECONDS * _nonnegative(values, column), strict=True)
    return Polynomial(found, tuple(layout.axes))


def _random_widths(groups: Sequence[Group], generator: np.random.Generator) -> dict[str, int]:
    """Every group at a step of its own between a quarter of its sizes and all of them, at multiples of 8 if it has enough."""
    widths: dict[str, int] = {}
    for group in groups:
        steps = np.arange(max(1, group.steps // 4), group.steps + 1)
        sizes, multiple = max(group.sizes) * steps // group.steps, 8
        while multiple > 1 and (sizes % multiple == 0).sum() < LEVELS:
            multiple //= 2
        widths.update(group.at(int(generator.choice(steps[sizes % multiple == 0]))))
    return widths


def _times(models: Sequence[nn.Module], image: torch.Tensor, seconds: float) -> tuple[list[str], list[np.ndarray]]:
    """Paths of the modules that start the segments, and seconds of each segment for each model: medians of interleaved runs."""
    laps: list[list[np.ndarray]] = [[] for _ in models]
    begin = latency.clock()
    while True:
        for model, own in zip(models, laps, strict=True):
            with _marked(model) as marks:
                marks.append(("", latency.clock()))
                model(image)
                marks.append(("", latency.clock()))
            own.append(np.diff([at for _, at in marks]))
        # The first pass prepares kernels and is dropped.
        done, spent = len(laps[0]) - 1, latency.clock() - begin
        if done >= RUNS[0] and (spent + spent / (done + 1) > seconds or done >= RUNS[1]):
            break
    return [path for path, _ in marks[:-1]], [np.median(own[1:], axis=0) for own in laps]


@contextmanager
def _marked(model: nn.Module) -> Iterator[list[tuple[str, float]]]:
    """Within, every module with parameters of its own notes its path and the time when it starts."""
    marks: list[tuple[str, float]] = []
    handles = []
    for path, module in model.named_modules():
        if path and next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(lambda _, __, path=path: marks.append((path, latency.clock()))))
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _features(layout: Layout, path: str) -> list[Term]:
    """What the time of a segment may be proportional to: 1, the elements of its module's tensors, and their dimensions."""
    features: dict[frozenset[tuple[str, ...]], Term] = {frozenset({()}): 1}
    for name, dims in layout.params.items():
        if name.rpartition(".")[0] == path and name in layout.trained:
            for term in (terms.product(*map(parse, dims)), *map(parse, dims)):
                # Terms that differ by a constant factor say the same.
                features.setdefault(frozenset(monomials(term)), term)
    return list(features.values())


def _nonnegative(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares with coefficients of at least 0: the best of the plain solutions over subsets of the features."""
    scaled = values / values.max(axis=0)
    best, error = np.zeros(values.shape[1]), float("inf")
    for count in range(1, min(values.shape[1], MOST_FEATURES) + 1):
        for subset in map(list, combinations(range(values.shape[1]), count)):
            solution = np.linalg.lstsq(scaled[:, subset], target, rcond=None)[0]
            residual = float(((scaled[:, subset] @ solution - target) ** 2).sum())
            if (solution >= 0).all() and residual < error:
                best, error = np.zeros(values.shape[1]), residual
                best[subset] = solution / values.max(axis=0)[subset]
    return best

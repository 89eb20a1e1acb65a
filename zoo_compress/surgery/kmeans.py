"""k-means of numbers: sorted once, a cluster is a range of them, and a step is k means out of running sums."""

from __future__ import annotations

import numpy as np

STEPS = 300
"""At most; most often far fewer change nothing any more."""


def kmeans(values: np.ndarray, clusters: int) -> np.ndarray:
    """Centroids by Lloyd's algorithm, from evenly spaced ones (linear initialisation, Han et al. 2016, section 3.2).

    Even spacing gives large weights, which are few and matter most, centroids of their own.

    Args:
        values: Finite numbers (n,).
        clusters: Number of centroids.

    Returns:
        Centroids (clusters,), ascending. Those that no value is nearest to stay where they were.
    """
    ordered = np.sort(values.astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.linspace(ordered[0], ordered[-1], clusters)
    before = None
    for _ in range(STEPS):
        cuts = np.concatenate([[0], np.searchsorted(ordered, _between(centroids)), [len(ordered)]])
        if before is not None and np.array_equal(cuts, before):
            break
        counts = np.diff(cuts)
        centroids = np.where(counts > 0, np.diff(sums[cuts]) / np.maximum(counts, 1), centroids)
        before = cuts
    return centroids


def nearest(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Index of the nearest of ascending centroids for each value (n,)."""
    return np.searchsorted(_between(centroids), values)


def _between(centroids: np.ndarray) -> np.ndarray:
    return (centroids[1:] + centroids[:-1]) / 2

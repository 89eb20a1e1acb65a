"""Two weights for one: exact at full rank, as good as can be below, and as good as they say; against independent computations."""

import itertools

import numpy as np
import pytest
import torch

from zoo_compress.structure.factors import Factor, LayerShape
from zoo_compress.surgery import decompose
from zoo_compress.surgery.decompose import Seen, energy, fit, losses
from zoo_compress.surgery.factors import composed

SHAPES = {"svd": (10, 14), "spatial": (8, 6, 3, 5), "channel": (8, 4, 3, 3), "separable": (12, 5, 3, 3)}


def weight_of(kind):
    return torch.randn(SHAPES[kind], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def full_rank(kind):
    outputs, inputs, *kernel = SHAPES[kind]
    return LayerShape(outputs, inputs, tuple(kernel)).full_rank(kind)


def inputs_of(kind, rows=400):
    """Correlated inputs, as images are: (rows, columns)."""
    columns = weight_of(kind).flatten(1).shape[1]
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator) @ (mixing * torch.linspace(2, 0.1, columns).double())


def seen_of(kind):
    x = inputs_of(kind)
    weights = torch.linspace(0.2, 3, SHAPES[kind][0], dtype=torch.float64)
    return Seen(x.mT @ x / len(x), torch.zeros(x.shape[1], dtype=torch.float64), weights)


@pytest.fixture(params=[False, True], ids=["weights", "data"])
def seen(request, kind):
    return seen_of(kind) if request.param else None


@pytest.fixture(params=list(SHAPES))
def kind(request):
    return request.param


def test_full_rank_is_exact(kind, seen):
    weight = weight_of(kind)
    factor = Factor(kind=kind, rank=full_rank(kind))
    found = fit(factor, weight, seen)
    torch.testing.assert_close(composed(factor, found.first, found.second), weight, rtol=1e-4, atol=1e-4)


def test_losses_are_what_the_two_weights_leave(kind, seen):
    weight, ranks = weight_of(kind), np.arange(1, full_rank(kind))
    said = losses(kind, weight, seen, ranks, energy(weight, seen))
    assert (np.diff(said) <= 1e-9 * said[0]).all()
    x = torch.eye(weight.flatten(1).shape[1], dtype=torch.float64) if seen is None else inputs_of(kind)
    scale = torch.ones(len(weight), dtype=torch.float64) if seen is None else seen.weights
    for rank, loss in zip(ranks, said, strict=True):
        factor = Factor(kind=kind, rank=int(rank))
        found = fit(factor, weight, seen)
        missing = (weight - composed(factor, found.first, found.second)).flatten(1) @ x.mT
        left = float(scale @ missing.square().sum(1)) / (1 if seen is None else len(x))
        assert left == pytest.approx(loss, rel=1e-5, abs=1e-6 * energy(weight, seen))


@pytest.mark.parametrize("kind", ["svd", "channel"])
def test_with_data_the_loss_is_that_of_the_outputs_principal_components(kind):
    """Zhang et al. 2016, equation 4: the best outputs of a rank are a projection on leading eigenvectors of their covariance."""
    weight, seen, x = weight_of(kind), seen_of(kind), inputs_of(kind)
    outputs = (x @ weight.flatten(1).mT) * seen.weights.sqrt()
    values = torch.linalg.eigvalsh(outputs.mT @ outputs / len(x))
    ranks = np.arange(1, full_rank(kind))
    expected = [float(values[: len(values) - rank].sum()) for rank in ranks]
    np.testing.assert_allclose(losses(kind, weight, seen, ranks, energy(weight, seen)), expected, rtol=1e-6, atol=1e-8)


def test_no_horizontal_filters_are_better_than_those_of_least_squares():
    weight, seen, x = weight_of("spatial"), seen_of("spatial"), inputs_of("spatial")
    inputs, height, width = weight.shape[1:]
    rank = 4
    found = fit(Factor(kind="spatial", rank=rank), weight, seen)
    # What the second layer reads, from the patches themselves.
    patches = x.reshape(-1, inputs, height, width)
    reads = torch.einsum("nchw,rch->nrw", patches, found.first[..., 0]).flatten(1)
    solved = torch.linalg.lstsq(reads, x @ weight.flatten(1).mT).solution
    torch.testing.assert_close(found.second[:, :, 0].flatten(1).mT, solved, rtol=1e-5, atol=1e-6)


def test_separable_filters_are_the_best_for_each_input_channel():
    weight = weight_of("separable")
    found = fit(Factor(kind="separable", rank=1), weight, None)
    product = composed(Factor(kind="separable", rank=1), found.first, found.second)
    for channel in range(weight.shape[1]):
        matrix = weight[:, channel].flatten(1)
        u, s, v = torch.linalg.svd(matrix)
        torch.testing.assert_close(product[:, channel].flatten(1), s[0] * u[:, :1] @ v[:1])


def test_each_turn_of_separable_least_squares_is_better(monkeypatch):
    weight, seen = weight_of("separable"), seen_of("separable")
    left = []
    for turns in (1, 2, 3, 4):
        monkeypatch.setattr(decompose, "TURNS", turns)
        left.append(float(losses("separable", weight, seen, np.array([1]), energy(weight, seen))[0]))
    assert all(later <= earlier * (1 + 1e-7) for earlier, later in itertools.pairwise(left))
    by_weight = fit(Factor(kind="separable", rank=1), weight, None)
    assert left[0] < energy(weight - composed(Factor(kind="separable", rank=1), by_weight.first, by_weight.second), seen)


def test_the_shift_is_what_the_mean_of_the_output_lost():
    weight = weight_of("svd")
    mean = torch.linspace(-1, 1, weight.shape[1], dtype=torch.float64)
    seen = Seen(seen_of("svd").covariance, mean, torch.ones(len(weight), dtype=torch.float64))
    factor = Factor(kind="svd", rank=3)
    found = fit(factor, weight, seen)
    torch.testing.assert_close(composed(factor, found.first, found.second) @ mean + found.shift, weight @ mean)

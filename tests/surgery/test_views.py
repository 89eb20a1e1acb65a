"""Views take the elements that `terms.index` names, from the memory of the bank."""

import numpy as np
import pytest
import torch

from zoo_compress.structure import terms
from zoo_compress.structure.terms import parse
from zoo_compress.surgery.views import narrowed

BASE = {"a": 4, "b": 6, "c": 3}


@pytest.mark.parametrize(
    "dims", [("a",), ("a", "b"), ("3 a", "b"), ("a 2", "b c"), ("a + b + c", "2 c"), ("3 a c", "a + 2 b", "5"), ("a + 2",)]
)
@pytest.mark.parametrize("sizes", [{"a": 4, "b": 6, "c": 3}, {"a": 2, "b": 6, "c": 3}, {"a": 4, "b": 3, "c": 1}, {"a": 1, "b": 5, "c": 2}])
def test_the_first_elements_of_every_axis(dims, sizes):
    shape = [terms.size(parse(dim), BASE) for dim in dims]
    tensor = torch.arange(float(np.prod(shape))).reshape(shape).requires_grad_(True)
    found = narrowed(tensor, dims, BASE, sizes)
    first = {name: range(size) for name, size in sizes.items()}
    places = [terms.index(parse(dim), BASE, first) for dim in dims]
    expected = tensor.detach().numpy()[np.ix_(*places)]
    assert np.array_equal(found.detach().numpy(), expected)
    found.sum().backward()
    reached = np.zeros(shape)
    reached[np.ix_(*places)] = 1
    assert np.array_equal(np.broadcast_to(tensor.grad.numpy(), shape), reached)


@pytest.mark.parametrize("dim", ["a", "a c", "2 + a"])
def test_what_comes_first_in_memory_is_a_view(dim):
    tensor = torch.zeros(terms.size(parse(dim), BASE), 5)
    narrowed(tensor, (dim, "5"), BASE, {**BASE, "a": 2}).fill_(1)
    assert tensor.sum() == 5 * terms.size(parse(dim), {**BASE, "a": 2})

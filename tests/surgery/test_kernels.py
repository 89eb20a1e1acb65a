"""Results of operations without data: the same as without the memory of earlier ones."""

import pytest
import torch

from zoo_compress.surgery.kernels import Kernels

aten = torch.ops.aten
META = torch.empty(4, 6, device="meta")


def test_equal_shapes_run_once():
    kernels = Kernels()
    first = kernels(aten.relu.default, (META,), {})
    again = kernels(aten.relu.default, (torch.empty(4, 6, device="meta"),), {})
    assert len(kernels._known) == 1
    assert first is not again
    assert (again.shape, again.stride(), again.dtype) == (first.shape, first.stride(), first.dtype)


@pytest.mark.parametrize(
    ("args", "other"),
    [
        ((META, 1), (META, 1.5)),
        ((META.int(), 1), (META.int(), 1.0)),
        ((META.bool(), 1), (META.bool(), True)),
        ((META, META), (META.t().contiguous().t(), META.t().contiguous().t())),
        ((META, META), (META[:1], META)),
    ],
)
def test_arguments_that_differ_are_told_apart(args, other):
    kernels = Kernels()
    for given in (args, other):
        expected = aten.add.Tensor(*given)
        for _ in range(2):
            out = kernels(aten.add.Tensor, given, {})
            assert (out.shape, out.stride(), out.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_several_results():
    kernels = Kernels()
    args = (META, [6], None, None, 1e-5)
    first, again = (kernels(aten.native_layer_norm.default, args, {}) for _ in range(2))
    assert [t.shape for t in first] == [t.shape for t in again]


def test_views_and_operations_in_place_are_run():
    kernels = Kernels()
    assert kernels(aten.view.default, (META, [24]), {})._base is not None
    assert kernels(aten.relu_.default, (META,), {}) is META
    assert not kernels._known


def test_tensors_with_data_are_computed():
    kernels = Kernels()
    for value in (1.0, 2.0):
        assert kernels(aten.add.Tensor, (torch.tensor([value]), 1), {}).item() == value + 1
    assert not kernels._known

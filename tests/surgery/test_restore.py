"""Restoring a record: exactly the recorded structure, or an error and an untouched model."""

import copy

import pytest
import torch
from torch import nn

from zoo_compress.errors import CompressError, VariantError
from zoo_compress.structure.variant import Variant
from zoo_compress.surgery.modules import clear_caches, get_attribute, get_tensor, set_attribute, set_tensors
from zoo_compress.surgery.restore import check, present, restore_


class Tiny(nn.Module):
    """A convolution, a norm and two tied classifiers, with every kind of attribute a record may name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.LayerNorm([16])
        self.head = nn.Linear(16, 10)
        self.twin = nn.Linear(16, 10)
        self.twin.weight = self.head.weight
        self.register_buffer("table", torch.arange(16))
        self.other = nn.Module()
        self.other.register_buffer("shared", self.table)
        self.num_features = 16
        self.scale = 16**-0.5
        self.flag = True
        self.feature_info = [{"num_chs": 16, "module": "conv"}, {"num_chs": 16, "module": "norm"}]

    def forward(self, x):
        x = self.norm(self.conv(x).mean((2, 3))) * self.scale
        return self.head(x) + self.twin(x) + self.table.sum() * 0 + self.num_features * 0


def record(**changes):
    valid = {
        "version": 1,
        "method": "pruned",
        "base": "tiny",
        "sizes": {"c": 5},
        "params": {
            "conv.weight": ["c", None, None, None],
            "conv.bias": ["c"],
            "norm.weight": ["c"],
            "norm.bias": ["c"],
            "head.weight": [None, "c"],
            "twin.weight": [None, "c"],
            "table": ["c"],
        },
        "attributes": {"num_features": "c", "norm.normalized_shape[0]": "c", "feature_info[1].num_chs": "c", "conv.out_channels": "c"},
        "scales": {"scale": "c"},
    }
    for key, value in changes.items():
        valid[key] = {**valid[key], **value}
    return Variant.from_dict(valid)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, model.num_features, copy.deepcopy(model.feature_info)


def test_gives_the_recorded_structure():
    model = Tiny().eval()
    model.conv.requires_grad_(False)
    old = copy.deepcopy(model)
    model.conv.training = True
    assert restore_(model, record()) is model
    assert torch.equal(model.conv.weight, old.conv.weight[:5])
    assert torch.equal(model.head.weight, old.head.weight[:, :5])
    assert not model.conv.weight.requires_grad
    assert model.head.weight.requires_grad
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert model.twin.weight is model.head.weight, "tied parameters stay tied"
    assert model.table is model.other.shared
    assert model.table.tolist() == [0, 1, 2, 3, 4]
    assert (model.num_features, model.norm.normalized_shape, model.conv.out_channels) == (5, (5,), 5)
    assert [info["num_chs"] for info in model.feature_info] == [16, 5]
    assert model.scale == 5**-0.5
    assert model.conv.training
    assert not model.training
    model(torch.randn(2, 3, 8, 8)).sum().backward()


def test_dimensions_as_in_the_base_follow_the_base():
    model = Tiny()
    model.head = model.twin = nn.Linear(16, 37)
    restore_(model, record())
    assert model.head.weight.shape == (37, 5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"params": {"conv2.weight": ["c"]}}, ["conv2.weight", "no such parameter"]),
        ({"params": {"conv": ["c"]}}, ["'conv'", "no such parameter"]),
        ({"params": {"forward.weight": ["c"]}}, ["forward.weight", "no such parameter"]),
        ({"params": {"conv.bias": ["c", "c"]}}, ["conv.bias", "1 dimensions", "found 2"]),
        ({"params": {"conv.bias": ["c c"]}}, ["conv.bias", "(16,)", "(25,)"]),
        ({"sizes": {"c": 17}}, ["conv.weight", "(16, 3, 3, 3)", "(17, 3, 3, 3)"]),
        ({"sizes": {"c": 2**31 - 1}}, ["conv.weight", "2147483647"]),
        ({"params": {"conv.bias": ["0 c"]}}, ["conv.bias", "(0,)"]),
        ({"params": {"twin.weight": [None, "c + 1"]}}, ["twin.weight", "tied", "head.weight"]),
        ({"attributes": {"__class__": "c"}}, ["__class__", "no such plain attribute"]),
        ({"attributes": {"forward": "c"}}, ["forward", "no such plain attribute"]),
        ({"attributes": {"conv.forward": "c"}}, ["conv.forward", "no such plain attribute"]),
        ({"attributes": {"__dict__.num_features": "c"}}, ["no such plain attribute"]),
        ({"attributes": {"conv._parameters.weight": "c"}}, ["no such plain attribute"]),
        ({"attributes": {"conv._parameters": "c"}}, ["type int", "dict"]),
        ({"attributes": {"nope.num_features": "c"}}, ["nope.num_features"]),
        ({"attributes": {"num_features[0]": "c"}}, ["num_features[0]"]),
        ({"attributes": {"norm.normalized_shape[1]": "c"}}, ["normalized_shape[1]"]),
        ({"attributes": {"feature_info[0].module": "c"}}, ["type int", "str"]),
        ({"attributes": {"os; import": "c"}}, ["os; import"]),
        ({"attributes": {"training": "c"}}, ["training", "type int", "bool"]),
        ({"attributes": {"flag": "c"}}, ["flag", "type int", "bool"]),
        ({"attributes": {"scale": "c"}}, ["scale", "type int", "float"]),
        ({"attributes": {"num_features": "c c"}}, ["num_features", "1 to 16", "25"]),
        ({"attributes": {"num_features": "0"}}, ["num_features", "1 to 16", "found 0"]),
        ({"scales": {"num_features": "c"}}, ["num_features", "type float", "int"]),
        ({"scales": {"scale": "4 c"}}, ["scale", "at most the base's", "20"]),
        ({"scales": {"scale": "0"}}, ["scale", "found 0"]),
    ],
)
def test_refuses_what_does_not_fit_and_changes_nothing(changes, said):
    model = Tiny()
    before = snapshot(model)
    with pytest.raises(VariantError) as caught:
        restore_(model, record(**changes))
    for part in said:
        assert part in str(caught.value)
    assert isinstance(caught.value, CompressError)
    after = snapshot(model)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


def test_part_of_a_record_for_part_of_a_model():
    model = Tiny()
    del model.head, model.twin, model.num_features
    with pytest.raises(VariantError, match=r"head\.weight"):
        check(model, record())
    part = present(model, record())
    assert part.params.keys() == record().params.keys() - {"head.weight", "twin.weight"}
    assert part.attributes.keys() == record().attributes.keys() - {"num_features"}
    restore_(model, part)
    assert model.conv.weight.shape[0] == 5


@pytest.mark.parametrize("path", ["num_features", "norm.normalized_shape[0]", "feature_info[1].num_chs"])
def test_attributes_by_path(path):
    model = Tiny()
    kind = type(model.norm.normalized_shape)
    set_attribute(model, path, 7)
    assert get_attribute(model, path) == 7
    assert type(model.norm.normalized_shape) is kind
    assert model.feature_info[0] == {"num_chs": 16, "module": "conv"}


def test_set_tensors_drops_a_gradient_that_no_longer_fits():
    model = Tiny()
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    set_tensors(model, [("conv.bias", torch.zeros(5))])
    assert get_tensor(model, "conv.bias").grad is None
    assert get_tensor(model, "conv.bias").shape == (5,)
    with pytest.raises(AttributeError, match="no parameter or buffer"):
        get_tensor(model, "conv.scale")


def test_caches_are_dropped_without_changing_modes():
    class Caching(nn.Linear):
        cache = None

        def train(self, mode=True):
            self.cache = None if mode else self.cache
            return super().train(mode)

    model = nn.Sequential(Caching(2, 2), Caching(2, 2)).eval()
    model[0].cache = model[1].cache = torch.ones(1)
    model[1].training = True
    clear_caches(model)
    assert model[0].cache is None
    assert model[1].cache is None
    assert [m.training for m in model.modules()] == [False, False, True]

"""Layers that become two: the same at full rank, and refused with a reason where the model does more with them than to call them."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.errors import VariantError
from zoo_compress.structure.factors import Factor
from zoo_compress.surgery.decompose import fit
from zoo_compress.surgery.factors import composed, pair, put, refused, replace_, shape_of
from zoo_compress.surgery.layers import dense_layers

LAYERS = {
    "linear": nn.Linear(6, 9),
    "pointwise": nn.Conv2d(6, 4, 1, stride=2, padding=1),
    "plain": nn.Conv2d(3, 5, 3, padding=1, bias=False),
    "strided": nn.Conv2d(3, 5, (3, 5), stride=(2, 1), padding=(1, 0)),
    "dilated": nn.Conv2d(3, 5, 3, dilation=(1, 2), padding=2),
    "same": nn.Conv2d(3, 5, (3, 2), padding="same"),
    "reflecting": nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    "flat": nn.Conv2d(3, 5, (1, 3)),
}
CASES = [(name, kind) for name, layer in LAYERS.items() for kind in shape_of(layer).kinds()]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_at_full_rank_two_layers_give_what_the_one_gives(name, kind):
    layer = copy.deepcopy(LAYERS[name]).double()
    factor = Factor(kind=kind, rank=shape_of(layer).full_rank(kind))
    two = pair(layer, factor)
    found = fit(factor, layer.weight, None)
    two[0].weight.data.copy_(found.first)
    two[1].weight.data.copy_(found.second)
    torch.testing.assert_close(composed(factor, two[0].weight, two[1].weight), layer.weight)
    x = torch.randn(2, 7, layer.in_features) if name == "linear" else torch.randn(2, layer.in_channels, 9, 8)
    torch.testing.assert_close(two(x.double()), layer(x.double()))


def test_a_pair_is_as_its_layer():
    layer = nn.Conv2d(3, 5, 3).half().eval().requires_grad_(False)
    two = pair(layer, Factor(kind="spatial", rank=2))
    assert {p.dtype for p in two.parameters()} == {torch.float16}
    assert not two.training
    assert not any(p.requires_grad for p in two.parameters())
    assert torch.equal(two[1].bias, layer.bias)


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Plain(nn.Module):
    """Three convolutions; subclasses do odd things with the one in the middle."""

    conv = nn.Conv2d

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = self.conv(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.num_classes = 5

    def twist(self, x):
        return self.middle(x)

    def forward(self, x):
        return self.head(self.last(self.twist(self.stem(x).relu()).relu()).relu().mean((2, 3)))


class Standardised(Plain):
    conv = StandardisedConv


class ReadsWeight(Plain):
    def twist(self, x):
        return F.conv2d(x, self.middle.weight, self.middle.bias, padding=1)


class AsksForWeight(Plain):
    def twist(self, x):
        weight = getattr(self.middle, "weight", None)
        return self.middle(x) if weight is None else self.middle(x) * (1 + weight.mean())


class ReadsDtype(Plain):
    def twist(self, x):
        return self.middle(x.to(self.middle.weight.dtype))


class ReadsAttribute(Plain):
    def twist(self, x):
        return self.middle(x) / self.middle.out_channels


class AsksForAttribute(Plain):
    def twist(self, x):
        return self.middle(x) / getattr(self.middle, "out_channels", 1)


class KeepsAList(Plain):
    def __init__(self):
        super().__init__()
        self.hidden = [self.middle]

    def twist(self, x):
        return self.hidden[0](x)


class Tied(Plain):
    def __init__(self):
        super().__init__()
        self.last.weight = self.middle.weight


class TwoNames(Plain):
    def __init__(self):
        super().__init__()
        self.again = self.middle

    def twist(self, x):
        return self.again(self.middle(x))


class Grouped(Plain):
    def __init__(self):
        super().__init__()
        self.middle = nn.Conv2d(8, 8, 3, padding=1, groups=2)


class Unused(Plain):
    def twist(self, x):
        return x


class Hooked(Plain):
    def __init__(self):
        super().__init__()
        self.middle.register_forward_hook(lambda module, args, out: None)


class Parametrized(Plain):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.middle)


REFUSED = {
    Standardised: "StandardisedConv computes something else of its weight than a Conv2d does",
    ReadsWeight: "reads its weight in other places",
    AsksForWeight: "reads its weight in other places",
    ReadsDtype: "reads its weight in other places",
    ReadsAttribute: "asks for more of it than to be called",
    AsksForAttribute: "computes something else",
    KeepsAList: "computes something else",
    Tied: "another layer's too",
    TwoNames: "several names",
    Grouped: "in groups",
    Unused: "not used",
    Hooked: "hooks",
    Parametrized: "parametrize.remove_parametrizations",
}


def reasons(model, image):
    layers, left = dense_layers(model, zc.analyze(model, image), image)
    return {**left, **refused(model, {path: Factor(kind=layer.shape.kinds()[0], rank=1) for path, layer in layers.items()}, image)}


def test_a_plain_network_bears_it():
    found = reasons(Plain(), torch.randn(2, 3, 8, 8))
    assert found == {"stem": "the first: adapted to other channels", "head": "a classifier: made anew for other classes"}


@pytest.mark.parametrize("kind", list(REFUSED), ids=lambda kind: kind.__name__)
def test_layers_of_which_more_is_asked_are_refused_and_no_others(kind):
    found = reasons(kind(), torch.randn(2, 3, 8, 8))
    assert REFUSED[kind] in found["middle"]
    assert found.keys() - {"last" if kind is Tied else ""} == {"stem", "head", "middle"}


def test_what_is_refused_would_have_been_wrong():
    """The network that asks for an attribute runs with two layers in place of one, and gives something else."""
    model = AsksForAttribute().double()
    two = copy.deepcopy(model)
    factor = Factor(kind="channel", rank=8)
    new = pair(model.middle, factor)
    found = fit(factor, model.middle.weight, None)
    new[0].weight.data.copy_(found.first)
    new[1].weight.data.copy_(found.second)
    put(two, "middle", new)
    x = torch.randn(2, 3, 8, 8).double()
    assert not torch.allclose(two(x), model(x))


def test_attention_that_reads_weights_keeps_its_projections():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 4, 4)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.mlp = nn.Linear(16, 16)
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            x = self.embed(x).flatten(2).mT
            return self.head(self.mlp(self.attention(x, x, x)[0]).mean(1))

    found = reasons(Attention(), torch.randn(2, 3, 16, 16))
    assert "reads its weight in other places" in found["attention.out_proj"]
    assert "mlp" not in found


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_costs_are_those_that_an_analysis_counts(name):
    model = timm.create_model(name)
    layout = zc.analyze(model)
    layers, _ = dense_layers(model, layout)
    for path, layer in list(layers.items())[:6]:
        for kind in layer.shape.kinds():
            new = zc.analyze(replace_(copy.deepcopy(model), {path: Factor(kind=kind, rank=3 if kind != "separable" else 1)}))
            rank = 3 if kind != "separable" else 1
            assert new.macs() == layout.macs() - layer.macs + rank * layer.macs_per_rank(kind)
            assert new.num_params() == layout.num_params() - layer.params + rank * layer.params_per_rank(kind)


@pytest.mark.parametrize(
    ("path", "factor", "message"),
    [
        ("nowhere", Factor(kind="svd", rank=1), "no such layer"),
        ("", Factor(kind="svd", rank=1), "no such layer"),
        ("stem", Factor(kind="svd", rank=1), "expected one of spatial, channel, separable, found 'svd'"),
        ("stem", Factor(kind="channel", rank=9), "expected at most 8, the full rank, found 9"),
        ("head", Factor(kind="spatial", rank=1), "expected one of svd"),
    ],
)
def test_factors_that_do_not_fit_a_base_change_nothing(path, factor, message):
    model = Plain()
    before = dict(model.named_modules())
    with pytest.raises(VariantError, match=message):
        replace_(model, {"last": Factor(kind="spatial", rank=2), path: factor})
    assert dict(model.named_modules()) == before

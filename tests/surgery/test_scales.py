"""The scale of an attention follows its head width, however it is applied; other numbers of that value do not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zoo_compress as zc

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, style, dim=64, heads=4):
        super().__init__()
        self.style, self.heads, self.width = style, heads, dim // heads
        self.scale, self.by_hand = self.width**-0.5, False
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(STYLES[self.style](self, q, k, v).transpose(1, 2).reshape(b, n, -1))


def switched(self, q, k, v):
    return ((q * self.scale) @ k.mT).softmax(-1) @ v if self.by_hand else F.scaled_dot_product_attention(q, k, v)


STYLES = {
    "fused": lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "given": lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=self.scale),
    "query": lambda self, q, k, v: ((q * self.scale) @ k.transpose(-1, -2)).softmax(-1) @ v,
    "product": lambda self, q, k, v: ((q @ k.transpose(-1, -2)) * self.scale).softmax(-1) @ v,
    "in place": lambda self, q, k, v: (q @ k.transpose(-1, -2)).mul_(self.scale).softmax(-1) @ v,
    "einsum": lambda self, q, k, v: (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(-1) @ v,
    "switched": switched,
    "key": lambda self, q, k, v: (q @ (k * self.scale).mT).softmax(-1) @ v,
    "dropped": lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=self.scale if self.training else 0.0),
    "gain": lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v) * self.scale,
    "both": lambda self, q, k, v: ((q * self.scale) @ k.mT).softmax(-1) @ (v * self.scale),
    "recomputed": lambda self, q, k, v: ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v,
    "power": lambda self, q, k, v: ((q @ k.mT) * pow(self.width, 0.5) ** -1).softmax(-1) @ v,
    "divided": lambda self, q, k, v: ((q @ k.mT) / self.width**0.5).softmax(-1) @ v,
    "values": lambda self, q, k, v: (q @ k.mT).softmax(-1) @ v * q.shape[-1] ** -0.5,
    "other power": lambda self, q, k, v: ((q @ k.mT) * q.shape[-1] ** -1).softmax(-1) @ v,
}


class Net(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.patches, self.attn, self.fc = nn.Conv2d(3, 64, 8, 8), Attention(style), nn.Linear(64, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.fc((x + self.attn(x)).mean(1))


def head_width(layout):
    return layout.axes[layout.params["attn.qkv.weight"][0].split()[2]]


@pytest.mark.parametrize("style", ["fused", "given", "query", "product", "in place", "einsum", "key", "switched"])
def test_an_attribute_that_scales_queries_times_keys_follows(style):
    layout = zc.analyze(Net(style).eval(), IMAGES)
    assert head_width(layout).frozen is None
    assert layout.scales == {"attn.scale": layout.params["attn.qkv.weight"][0].split()[2]}


@pytest.mark.parametrize("style", ["dropped", "gain"])
def test_an_attribute_that_equals_the_scale_by_chance_is_left_alone(style):
    layout = zc.analyze(Net(style).eval(), IMAGES)
    assert head_width(layout).frozen is None
    assert not layout.scales


def test_an_attribute_that_is_the_scale_and_something_else_keeps_the_width():
    layout = zc.analyze(Net("both").eval(), IMAGES)
    assert "something else" in head_width(layout).frozen


@pytest.mark.parametrize(
    ("style", "free"), [("recomputed", True), ("power", True), ("divided", True), ("values", False), ("other power", False)]
)
def test_a_scale_computed_from_the_width_is_attentions_or_keeps_it(style, free):
    model = Net(style).eval()
    layout = zc.analyze(model, IMAGES)
    assert (head_width(layout).frozen is None) == free
    zc.verify(model, layout, IMAGES)


class Shared(nn.Module):
    """The scale is computed from residual width and heads. `tied`: so is the head width, which else is a number of its own."""

    def __init__(self, tied):
        super().__init__()
        self.tied, self.heads, self.width = tied, 4, 16
        self.patches, self.qkv, self.proj, self.fc = nn.Conv2d(3, 64, 8, 8), nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads if self.tied else self.width).permute(2, 0, 3, 1, 4)
        attention = ((q * (c // self.heads) ** -0.5) @ k.mT).softmax(-1)
        return self.fc((x + self.proj((attention @ v).transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_scale_computed_from_the_residual_width_follows_where_that_always_is_heads_times_head_width(tied):
    torch.manual_seed(0)
    model = Shared(tied).eval()
    layout = zc.analyze(model, IMAGES)
    assert (layout.axes[layout.params["patches.weight"][0]].frozen is None) == tied
    zc.verify(model, layout, IMAGES)
    if tied:
        small = zc.prune(model, macs=0.5, layout=layout)
        assert small.qkv.in_features // small.heads == small.qkv.out_features // 3 // small.heads < 16


class FourHeads(nn.Module):
    """Heads are a number of the code, so the head width is what shrinks."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.embed, self.qkv, self.proj, self.fc = nn.Linear(8, 64), nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x):
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, -1).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT) * self.scale(self, q)).softmax(-1) @ v
        return self.fc(x + self.proj(y.transpose(1, 2).flatten(2)))


SCALES = {"power": lambda self, q: pow(q.shape[-1], 0.5) ** -1, "rows": lambda self, q: (self.qkv.out_features // 12) ** -0.5}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_model_whose_scale_is_computed_anew_is_pruned(scale):
    """Fewer elements give another scale, which zeroed ones do not: the zeroing proof has nothing to say of that width."""
    torch.manual_seed(0)
    model, tokens = FourHeads(scale).eval(), torch.randn(2, 6, 8)
    layout = zc.analyze(model, tokens)
    assert head_width_of(layout) in layout.normalised & set(layout.free)
    zc.verify(model, layout, tokens)
    small = zc.prune(model, keep=0.5, layout=layout)
    assert small(tokens).shape == (2, 6, 5)
    assert small.qkv.out_features < 192


def head_width_of(layout):
    return layout.params["qkv.weight"][0].split()[-1]


def test_the_scale_survives_a_switch_to_the_other_way():
    """A pruned model computes the same fused and by hand."""
    torch.manual_seed(0)
    model = Net("switched").eval()
    model.attn.qkv.weight.data.mul_(8)
    small = zc.prune(model, macs=0.4, layout=zc.analyze(model, IMAGES)).eval()
    with torch.no_grad():
        fused = small(IMAGES)
        small.attn.by_hand = True
        torch.testing.assert_close(small(IMAGES), fused)

"""What the engine infers: small modules, one idea each, whose axes are known from their code."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.structure.widths import groups

IMAGE = torch.zeros(2, 3, 8, 8)


class Wrapped(nn.Module):
    """stem convolution → body → pooled classifier."""

    def __init__(self, body, width=16, out=None):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = body
        self.head = nn.Linear(out or width, 5)

    def forward(self, x):
        x = self.body(self.stem(x))
        return self.head(x.flatten(2).mean(-1) if x.ndim == 4 else x)


class Attention(nn.Module):
    """Written the three ways people write it: heads and width from attributes, from shapes, and with one of them left to -1."""

    def __init__(self, dim=16, heads=2, style="attributes"):
        super().__init__()
        self.num_heads, self.head_dim, self.style = heads, dim // heads, style
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, image):
        x = image.flatten(2).transpose(1, 2)
        batch, tokens, channels = x.shape
        last = {"attributes": self.head_dim, "shapes": channels // self.num_heads, "rest": -1}[self.style]
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, last).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x.reshape(batch, tokens, channels if self.style == "shapes" else self.num_heads * self.head_dim)
        return image + self.proj(x).transpose(1, 2).reshape(image.shape)


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.groups = 4
        self.conv = nn.Conv2d(16, 32, 1, groups=4)

    def forward(self, x):
        x = self.conv(x)
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class SplitCat(nn.Module):
    """Slices whose bound is an attribute, an odd and an even part, a concatenation."""

    def __init__(self):
        super().__init__()
        self.kept = 6
        self.conv = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.conv(x[:, : self.kept]), x[:, self.kept :]], dim=1)


class ChannelConvolution(nn.Module):
    """ECA: a 1-d convolution along the channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid()


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(16, 32, 1)

    def forward(self, x):
        value, gate = self.wide(x).chunk(2, dim=1)
        return value * gate.sigmoid()


class Padded(nn.Module):
    """A residual of fewer channels, padded with zeros."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 1)

    def forward(self, x):
        return self.conv(x) + F.pad(x, (0, 0, 0, 0, 0, 8))


class Scaled(nn.Module):
    """Squeeze and excitation, expanded by hand."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid().expand_as(x)


class Repeated(nn.Module):
    """Copies of channels, whose number is a plain argument: it may not change."""

    def __init__(self, interleave):
        super().__init__()
        self.interleave = interleave
        self.conv = nn.Conv2d(48, 16, 1)

    def forward(self, x):
        return self.conv(x.repeat_interleave(3, dim=1) if self.interleave else torch.tile(x, (1, 3, 1, 1)))


class Copies(nn.Module):
    """Copies of channels, whose number is an attribute: it may change."""

    def __init__(self):
        super().__init__()
        self.copies = 3
        self.conv = nn.Conv2d(48, 16, 1)

    def forward(self, x):
        return self.conv(x.repeat(1, self.copies, 1, 1))


class Asserted(nn.Module):
    """A number that only an assertion reads has to follow all the same, and so has the size of a table."""

    def __init__(self):
        super().__init__()
        self.dim = 16
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        assert x.shape[1] == self.dim
        assert self.scale.numel() == self.dim
        return x * self.scale[:, None, None]


class Standardised(nn.Conv2d):
    """A convolution whose weight is normalised first, as one image of its channels."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


class Normalised(nn.Module):
    """Divided by its norm, which torch expands to as many channels."""

    def forward(self, x):
        return F.normalize(x, dim=1)


class Blurred(nn.Module):
    """A fixed kernel for every channel, in a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.channels = 16
        self.register_buffer("kernel", torch.full((16, 1, 3, 3), 1 / 9), persistent=False)

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.kernel, stride=2, groups=self.channels)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16))
        self.register_buffer("order", torch.arange(15, -1, -1))

    def forward(self, x):
        return x + self.table[self.order][:, None, None]


BODIES = {
    "plain": (lambda: nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.Conv2d(12, 16, 1)), None, 3),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.SiLU()), None, 1),
    "multiplied depthwise": (lambda: nn.Conv2d(16, 32, 3, groups=16), 32, 2),
    "grouped": (lambda: nn.Conv2d(16, 24, 3, groups=2), 24, 3),
    "transposed": (lambda: nn.ConvTranspose2d(16, 12, 2, stride=2), 12, 2),
    "transposed grouped": (lambda: nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4), 24, 3),
    "group norm": (lambda: nn.GroupNorm(4, 16), None, 2),
    "attention, attributes": (lambda: Attention(style="attributes"), None, 3),
    "attention, shapes": (lambda: Attention(style="shapes"), None, 3),
    "attention, rest": (lambda: Attention(style="rest"), None, 3),
    "shuffle": (Shuffle, 32, 3),
    "split and cat": (SplitCat, 14, 3),
    "convolution along channels": (ChannelConvolution, None, 1),
    "gate": (Gate, None, 2),
    "padded residual": (Padded, 24, 1),
    "glu": (lambda: nn.Sequential(nn.Conv2d(16, 32, 1), nn.GLU(dim=1)), None, 2),
    "pixel shuffle": (lambda: nn.Sequential(nn.Conv2d(16, 24, 1), nn.PixelShuffle(2)), 6, 2),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), 64, 1),
    "unfold": (lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Unflatten(2, (4, 4))), 64, 1),
    "scaled": (Scaled, None, 1),
    "repeated": (lambda: Repeated(False), None, 2),
    "repeated one by one": (lambda: Repeated(True), None, 2),
    "copies": (Copies, None, 3),
    "standardised weights": (lambda: Standardised(16, 24, 1), 24, 2),
    "asserted": (Asserted, None, 1),
    "normalised": (Normalised, None, 1),
    "blurred": (Blurred, None, 1),
    "prelu": (lambda: nn.PReLU(16), None, 1),
    "batch norm in train mode's statistics": (lambda: nn.BatchNorm2d(16, track_running_stats=False), None, 1),
}


@pytest.mark.parametrize("name", BODIES)
def test_axes_are_found_and_proven(name):
    make, out, expected = BODIES[name]
    model = Wrapped(make(), out=out)
    layout = zc.analyze(model, IMAGE)
    assert not layout.unknown
    assert len(layout.free) == expected, layout
    proof = zc.verify(model, layout, IMAGE)
    assert proof.permutation_error < 1e-9
    assert layout.num_params() == sum(p.numel() for p in model.parameters())
    assert groups(layout), "no axis can be pruned"


def test_heads_carry_the_change_where_a_link_ties_them_to_the_width():
    model = Wrapped(Attention(style="shapes", dim=32, heads=8), width=32)
    layout = zc.analyze(model, IMAGE)
    assert layout.links
    linked = next(group for group in groups(layout) if len(group.axes) > 1)
    assert sorted(linked.sizes) == [8, 32]
    small = zc.resize(model, layout, linked.at(6))
    assert small.body.num_heads == 6
    assert small(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_a_broken_link_is_refused():
    model = Wrapped(Attention(style="shapes", dim=32, heads=8), width=32)
    layout = zc.analyze(model, IMAGE)
    name = next(name for name, axis in layout.axes.items() if axis.size == 8 and not axis.frozen)
    with pytest.raises(zc.CompressError, match="linked sizes differ"):
        zc.resize(model, layout, {name: 6})


def test_attention_scale_follows_the_head_width():
    """`scaled_dot_product_attention` takes its scale from the width it gets; a float attribute that says the same must agree."""

    class Scaled(Attention):
        def __init__(self):
            super().__init__(dim=16, heads=2)
            self.scale = self.head_dim**-0.5

    model = Wrapped(Scaled())
    layout = zc.analyze(model, IMAGE)
    width = layout.scales["body.scale"]
    assert zc.resize(model, layout, {width: 4}).body.scale == 0.5


def test_ordered_axis_is_pruned_in_order_only():
    layout = zc.analyze(Wrapped(ChannelConvolution()), IMAGE)
    (name,) = layout.free
    assert layout.axes[name].ordered
    with pytest.raises(zc.CompressError, match="ordered"):
        layout.sizes({name: [3, 1]})
    assert layout.sizes({name: [1, 3]})[name] == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (Positions, "looks it up by position"),
        (lambda: nn.Flatten(), None),
        (lambda: nn.ChannelShuffle(4), None),
    ],
)
def test_reasons_are_given(body, reason):
    model = Wrapped(body(), out=16 * 64 if isinstance(body(), nn.Flatten) else None)
    layout = zc.analyze(model, IMAGE)
    zc.verify(model, layout, IMAGE)
    reasons = [axis.frozen for axis in layout.axes.values() if axis.frozen]
    assert "model output (class logits)" in reasons
    assert "image channels" in reasons
    if reason:
        assert any(reason in r for r in reasons)


def test_an_operation_without_a_rule_freezes_and_is_counted():
    class Odd(nn.Module):
        def forward(self, x):
            return x + x.histc(4).sum()

    model = Wrapped(Odd())
    layout = zc.analyze(model, IMAGE)
    assert not [name for name in layout.free if layout.axes[name].size == 16]
    assert any("histc" in name for name in layout.unknown)
    assert any("has no rule" in (axis.frozen or "") for axis in layout.axes.values())


def test_a_rule_that_does_not_fit_freezes(monkeypatch):
    """A release of torch may change what an operation takes; the layout then loses axes, not truth."""
    from zoo_compress.surgery.rules import RULES

    def changed(t, out, *, gone):
        raise AssertionError

    monkeypatch.setitem(RULES, "convolution", changed)
    model = Wrapped(nn.Conv2d(16, 16, 1))
    layout = zc.analyze(model, IMAGE)
    assert layout.unknown == {"aten.convolution": 2}
    zc.verify(model, layout, IMAGE)


def test_functions_may_be_called_by_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Conv2d(16, 32, 1)

        def forward(self, x):
            value, gate = torch.chunk(input=self.wide(x), chunks=2, dim=1)
            return (value * gate).reshape(shape=x.shape)

    model = Wrapped(Keywords())
    layout = zc.analyze(model, IMAGE)
    zc.verify(model, layout, IMAGE)


def test_sizes_written_as_numbers_freeze():
    class Written(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], 16, -1).unflatten(2, (8, 8))

    layout = zc.analyze(Wrapped(Written()), IMAGE)
    frozen = next(axis for axis in layout.axes.values() if axis.size == 16)
    assert "writes its size as the number 16" in frozen.frozen


def test_unused_parameters_are_frozen():
    model = Wrapped(nn.ReLU())
    model.unused = nn.Linear(7, 9)
    layout = zc.analyze(model, IMAGE)
    (axis,) = {term for dim in layout.params["unused.bias"] for term in [dim]}
    assert "not used" in layout.axes[axis].frozen


def test_analysis_changes_nothing():
    model = Wrapped(Attention())
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    attributes = dict(vars(model.body))
    random_state = torch.get_rng_state()
    model.train()
    zc.analyze(model, IMAGE)
    assert model.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(type(value) is type(vars(model.body)[key]) for key, value in attributes.items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.data_ptr() == before[name][1]


def test_a_model_that_looks_at_values_is_analysed_too():
    class Looks(nn.Module):
        def forward(self, x):
            return x if bool((x.abs().sum() >= 0).item()) else -x

    model = Wrapped(Looks())
    assert zc.verify(model, zc.analyze(model, IMAGE), IMAGE).axes_checked


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        ("resnet18", None, "expected a torch.nn.Module, found str"),
        (nn.Linear(3, 3), None, "pass example_input"),
        (nn.Linear(3, 3), [1, 2], "expected a tensor"),
        (nn.Linear(3, 3), torch.zeros(2, 4), "does not run on an input of shape"),
    ],
)
def test_bad_input(model, example, message):
    with pytest.raises(zc.CompressError, match=message):
        zc.analyze(model, example)


class Recurrent(nn.Module):
    """Rows of an image as sequences; with `last`, only the final state is used."""

    def __init__(self, kind, last=False, **options):
        super().__init__()
        self.last = last
        self.rnn = kind(16, 12, batch_first=True, **options)

    def forward(self, x):
        batch, _, height, _ = x.shape
        out, state = self.rnn(x.permute(0, 2, 3, 1).flatten(0, 1))
        if self.last:
            state = state[0] if isinstance(state, tuple) else state
            return state.sum(0).unflatten(0, (batch, height)).mean(1)
        return out.unflatten(0, (batch, height)).mean((1, 2))


@pytest.mark.parametrize(
    ("kind", "options", "free"),
    [
        (nn.LSTM, {}, 2),
        (nn.GRU, {"bias": False}, 2),
        (nn.RNN, {"nonlinearity": "relu"}, 2),
        (nn.LSTM, {"bidirectional": True}, 3),
        (nn.LSTM, {"bidirectional": True, "num_layers": 2}, 5),
        (nn.LSTM, {"last": True, "bidirectional": True}, 2),
        (nn.GRU, {"last": True, "num_layers": 2}, 2),
        (nn.LSTM, {"proj_size": 6}, 3),
    ],
)
def test_recurrent_layers(kind, options, free):
    out = 12 * (2 if options.get("bidirectional") and not options.get("last") else 1) if "proj_size" not in options else 6
    model = Wrapped(Recurrent(kind, **options), out=out)
    layout = zc.analyze(model, IMAGE)
    assert len(layout.free) == free, layout
    assert zc.verify(model, layout, IMAGE).permutation_error < 1e-9
    assert layout.num_params() == sum(p.numel() for p in model.parameters())


class SharedAndOwn(nn.Module):
    """Costs that a batch pays once (a table put through a layer) and those that every sample pays, of the image and of a latent query."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 5))
        self.mlp = nn.Linear(5, 8)
        self.latent = nn.Parameter(torch.randn(1, 1, 8))
        self.query = nn.Linear(8, 8)
        self.embed = nn.Linear(3, 8)

    def forward(self, x):
        x = self.embed(x.flatten(2).mT) + self.mlp(self.table)
        return (self.query(self.latent.expand(len(x), -1, -1)) * x).mean(1)


def test_macs_are_those_of_a_sample_alone():
    layout = zc.analyze(SharedAndOwn(), torch.randn(2, 3, 4, 4))
    assert layout.macs() == 16 * 3 * 8 + 16 * 5 * 8 + 8 * 8

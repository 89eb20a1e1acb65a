"""Torch's own attention: widths, heads and attributes follow, whichever way it computes them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.structure.widths import groups
from zoo_compress.surgery.torch_attention import no_fast_path

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Attends(nn.Module):
    """Patches → a part called in one of many ways → classes."""

    def __init__(self, part, call, width=32):
        super().__init__()
        self.patches, self.part, self.call, self.head = nn.Conv2d(3, width, 4, 4), part, call, nn.Linear(width, 10)
        self.keys, self.values = (nn.Conv2d(3, n, 4, 4) for n in (24, 20))

    def forward(self, images):
        x, k, v = (layer(images).flatten(2).transpose(1, 2) for layer in (self.patches, self.keys, self.values))
        return self.head(self.call(self.part, x, k, v).mean(1)) + (k.mean((1, 2)) + v.mean((1, 2)))[:, None]


def padding(x):
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1) > 12


def first(part, x, k, v, **options):
    return x + part(x, x, x, **options)[0]


def attention(**options):
    return nn.MultiheadAttention(32, 4, batch_first=True, **options)


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **options)


def causal(x):
    return torch.ones(16, 16, dtype=torch.bool, device=x.device).triu(1)


def pooled(part, x, k, v):
    """One query, projections in three layers, another width for what comes out: as CLIP pools."""
    q, k, v, out = part
    x = x.transpose(0, 1)
    y, _ = F.multi_head_attention_forward(
        query=x.mean(0, keepdim=True),
        key=x,
        value=x,
        embed_dim_to_check=x.shape[-1],
        num_heads=4,
        q_proj_weight=q.weight,
        k_proj_weight=k.weight,
        v_proj_weight=v.weight,
        in_proj_weight=None,
        in_proj_bias=torch.cat([q.bias, k.bias, v.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=out.weight,
        out_proj_bias=out.bias,
        use_separate_proj_weight=True,
        training=False,
        need_weights=False,
    )
    return y.transpose(0, 1)


CASES = {
    "self attention": (attention, lambda m, x, k, v: first(m, x, k, v, need_weights=False)),
    "with weights": (attention, first),
    "weights that are used": (attention, lambda m, x, k, v: x + m(x, x, x)[1] @ x),
    "weights of each head": (attention, lambda m, x, k, v: x + m(x, x, x, average_attn_weights=False)[1].amax(1) @ x),
    "tokens first": (lambda: nn.MultiheadAttention(32, 4), lambda m, x, k, v: first(m, x.transpose(0, 1), k, v).transpose(0, 1)),
    "no biases": (lambda: attention(bias=False), first),
    "odd heads": (lambda: nn.MultiheadAttention(33, 3, batch_first=True), first),
    "one head": (lambda: nn.MultiheadAttention(32, 1, batch_first=True), first),
    "more keys": (lambda: attention(add_bias_kv=True, add_zero_attn=True), first),
    "more keys and padding": (lambda: attention(add_bias_kv=True), lambda m, x, k, v: first(m, x, k, v, key_padding_mask=padding(x))),
    "cross attention": (attention, lambda m, x, k, v: x + m(x, x[:, :5], x[:, :5], need_weights=False)[0]),
    "keys and values of other widths": (lambda: attention(kdim=24, vdim=20), lambda m, x, k, v: x + m(x, k, v)[0]),
    "mask": (attention, lambda m, x, k, v: first(m, x, k, v, attn_mask=causal(x), need_weights=False)),
    "causal": (attention, lambda m, x, k, v: first(m, x, k, v, attn_mask=causal(x), is_causal=True, need_weights=False)),
    "mask for each head": (
        attention,
        lambda m, x, k, v: first(m, x, k, v, attn_mask=torch.zeros(x.shape[0] * m.num_heads, 16, 16, device=x.device)),
    ),
    "padding": (attention, lambda m, x, k, v: first(m, x, k, v, key_padding_mask=padding(x), need_weights=False)),
    "one sample at a time": (attention, lambda m, x, k, v: x + torch.stack([m(one, one, one)[0] for one in x])),
    "pooled": (lambda: nn.ModuleList(nn.Linear(32, n) for n in (32, 32, 32, 32)), pooled),
    "encoder layer": (encoder_layer, lambda m, x, k, v: m(x)),
    "encoder layer, norms first": (lambda: encoder_layer(norm_first=True, activation="gelu"), lambda m, x, k, v: m(x)),
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2), lambda m, x, k, v: m(x)),
    "encoder of nested tensors": (
        lambda: nn.TransformerEncoder(encoder_layer(), 2),
        lambda m, x, k, v: m(x, src_key_padding_mask=padding(x))[:, :13],  # what it gives for padding depends on the way
    ),
    "encoder with a mask": (lambda: nn.TransformerEncoder(encoder_layer(), 2), lambda m, x, k, v: m(x, mask=causal(x))),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, batch_first=True), 2),
        lambda m, x, k, v: m(x[:, :6], x),
    ),
    "transformer": (lambda: nn.Transformer(32, 4, 1, 1, 48, batch_first=True), lambda m, x, k, v: m(x, x[:, :6])),
}


def made(name):
    part, call = CASES[name]
    torch.manual_seed(0)
    return Attends(part(), call, width=33 if name == "odd heads" else 32).eval()


@pytest.mark.parametrize("name", CASES)
def test_widths_heads_and_attributes_follow(name):
    model = made(name)
    layout = zc.analyze(model, IMAGES)
    assert zc.verify(model, layout, IMAGES).permutation_error < 1e-6
    assert layout.axes[layout.params["patches.weight"][0]].frozen is None, layout

    widths = {axis: size for group in groups(layout) for axis, size in group.at(max(1, group.steps // 2)).items()}
    small = zc.resize(model, layout, widths)
    width = small.patches.out_channels
    assert width < model.patches.out_channels
    for module in small.modules():
        if isinstance(module, nn.MultiheadAttention):
            assert module.embed_dim == width == module.num_heads * module.head_dim == module.out_proj.in_features
            key, value = (small.keys.out_channels, small.values.out_channels) if "other widths" in name else (width, width)
            assert (module.kdim, module.vdim) == (key, value)
        if isinstance(module, nn.Transformer):
            assert (module.d_model, module.nhead) == (width, module.encoder.layers[0].self_attn.num_heads)
    small.train()(IMAGES).sum().backward()
    # All ways torch has to compute it agree.
    small.eval()
    slow = small(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), slow.detach(), rtol=1e-4, atol=1e-5)


def test_heads_may_go_whole():
    model = made("self attention")
    layout = zc.analyze(model, IMAGES)
    heads, width = layout.attributes["part.num_heads"], layout.params["patches.weight"][0]
    keep = torch.arange(32)[torch.arange(32) % 4 != 1].tolist()
    small = zc.resize(model, layout, {heads: [0, 2, 3], width: keep})
    assert (small.part.num_heads, small.part.head_dim, small.part.embed_dim) == (3, 8, 24)
    rows = model.part.in_proj_weight.unflatten(0, (3, 4, 8))[:, [0, 2, 3]][..., keep].flatten(0, 2)
    assert torch.equal(small.part.in_proj_weight, rows)
    small(IMAGES)


def test_the_fast_path_is_left_as_it_was():
    assert torch.backends.mha.get_fastpath_enabled()
    zc.analyze(made("encoder"), IMAGES)
    assert torch.backends.mha.get_fastpath_enabled()
    first, second = no_fast_path(), no_fast_path()  # of two threads, which end in the order they began
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled()


def test_pruning_meets_a_budget_as_near_as_one_group_allows():
    model = made("self attention")
    small = zc.prune(model, macs=0.5, layout=zc.analyze(model, IMAGES))
    assert small.part.embed_dim < 32
    assert abs(zc.analyze(small, IMAGES).macs() / zc.analyze(model, IMAGES).macs() - 0.5) < 0.05


def test_keys_given_from_outside_are_frozen_with_a_reason():
    def call(m, x, k, v):
        given = k.transpose(1, 2)[:, :16, :8].repeat(4, 1, 1).reshape(x.shape[0] * 4, 16, 8)
        x = x.transpose(0, 1)
        weights = (m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0, m.out_proj.weight, m.out_proj.bias)
        return F.multi_head_attention_forward(x, x, x, 32, 4, *weights, static_k=given, static_v=given)[0].transpose(0, 1)

    model = Attends(attention(), call).eval()
    layout = zc.analyze(model, IMAGES)
    assert all(layout.axes[axis].frozen for term in layout.params["part.in_proj_weight"] for axis in term.split() if axis in layout.axes)
    zc.verify(model, layout, IMAGES)

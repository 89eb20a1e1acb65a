"""The proofs prove: a layout with one thing wrong does not pass."""

import dataclasses

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc


@pytest.fixture(scope="module")
def resnet():
    model = timm.create_model("test_resnet").eval()
    return model, zc.analyze(model)


def changed(layout, name, dim, term):
    dims = list(layout.params[name])
    dims[dim] = term
    return dataclasses.replace(layout, params={**layout.params, name: tuple(dims)})


def test_every_consumer_must_be_named(resnet):
    """Forgetting that a weight reads an axis: the permutation proof finds the axis."""
    model, layout = resnet
    name = next(n for n, dims in layout.params.items() if n.endswith("conv2.weight"))
    axis = layout.params[name][1]
    with pytest.raises(zc.VerificationError, match=f"permutation proof: permuting axis '{axis}'"):
        zc.verify(model, changed(layout, name, 1, str(layout.axes[axis].size)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_of_half_precision_disproves_nothing(resnet, dtype):
    _, layout = resnet
    half = timm.create_model("test_resnet").to(dtype).eval()
    assert zc.verify(half, layout).permutation_error < 1e-6
    assert {p.dtype for p in half.parameters()} == {dtype}


def test_unrelated_axes_must_not_be_merged(resnet):
    model, layout = resnet
    name = next(n for n, dims in layout.params.items() if n.endswith("conv2.weight"))
    wrong = next(a for a in layout.free if a != layout.params[name][1] and layout.axes[a].size == layout.axes[layout.params[name][1]].size)
    with pytest.raises(zc.VerificationError, match="permutation proof"):
        zc.verify(model, changed(layout, name, 1, wrong))


def test_frozen_axes_must_not_be_freed(resnet):
    model, layout = resnet
    classes = next(a for a, axis in layout.axes.items() if axis.frozen == "model output (class logits)")
    freed = dataclasses.replace(layout, axes={**layout.axes, classes: zc.Axis(layout.axes[classes].size)})
    with pytest.raises(zc.VerificationError, match=f"axis '{classes}'"):
        zc.verify(model, freed)


def test_product_order_matters():
    model = timm.create_model("test_vit").eval()
    layout = zc.analyze(model)
    name = next(n for n, dims in layout.params.items() if n.endswith("attn.qkv.weight"))
    three, heads, width = layout.params[name][0].split()
    assert three == "3"
    with pytest.raises(zc.VerificationError, match="permutation proof"):
        zc.verify(model, changed(layout, name, 0, f"{three} {width} {heads}"))


def test_attributes_must_follow():
    """Without the attribute that says how many heads there are, the resized model does not run, or not as computed."""
    model = timm.create_model("test_vit").eval()
    layout = zc.analyze(model)
    kept = {path: term for path, term in layout.attributes.items() if not path.endswith(("num_heads", "head_dim"))}
    assert len(kept) < len(layout.attributes)
    with pytest.raises(zc.VerificationError, match="resize proof"):
        zc.verify(model, dataclasses.replace(layout, attributes=kept))


def test_macs_must_add_up(resnet):
    model, layout = resnet
    term, count = layout.macs_terms[0]
    with pytest.raises(zc.VerificationError, match="MACs"):
        zc.verify(model, dataclasses.replace(layout, macs_terms=((term, count + 1), *layout.macs_terms[1:])))


def test_layout_of_another_model(resnet):
    _, layout = resnet
    with pytest.raises(zc.VerificationError, match=r"another model|analyze the model again"):
        zc.verify(timm.create_model("test_vit"), layout)


def test_the_model_is_left_alone(resnet):
    model, layout = resnet
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    zc.verify(model, layout)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_zeroing_runs_where_nothing_normalises():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    image = torch.zeros(2, 3, 8, 8)
    assert zc.verify(model, zc.analyze(model, image), image).zeroing_error < 1e-12
    model[1] = nn.GroupNorm(1, 8)
    assert zc.verify(model, zc.analyze(model, image), image).zeroing_error is None


def test_rounding_in_a_deep_network_is_no_wrong_layout():
    """Activations that grow from layer to layer would overflow, or drown the output in rounding."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU()) for _ in range(200)]
    for layer in layers:
        layer[0].weight.data *= 1e4
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    image = torch.randn(2, 3, 8, 8)
    layout = zc.analyze(model, image)
    assert zc.verify(model, layout, image).permutation_error < 1e-9

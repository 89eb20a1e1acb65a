"""Fresh weights: what the architecture itself draws, also for structures it has never had."""

import math

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.reinitialize import reinitialize


def trained(name, **kwargs):
    """A model none of whose tensors are as they were initialised."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=7, **kwargs).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(1 + torch.rand_like(tensor))
    return model


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_nfnet"])
def test_of_an_architecture_as_it_is_equals_what_timm_draws(name):
    model = trained(name, in_chans=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fresh = reinitialize(model, seed=3)
    torch.manual_seed(3)
    expected = timm.create_model(name, num_classes=7, in_chans=1).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in fresh.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_arguments_that_timm_tracks_are_the_architectures_too():
    args = {"class_token": False, "global_pool": "avg", "img_size": 48, "patch_size": 8}
    fresh = reinitialize(trained("test_vit", **args), seed=3)
    torch.manual_seed(3)
    expected = timm.create_model("test_vit", num_classes=7, **args).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_convnext", "test_efficientnet"])
def test_a_pruned_model_has_the_deviations_of_its_own_shapes(name):
    small = zc.prune(trained(name), keep=0.5)
    fresh = reinitialize(small)
    torch.manual_seed(0)
    start = dict(timm.create_model(name, num_classes=7).named_parameters())
    cut = 0
    for key, tensor in fresh.named_parameters():
        assert tensor.shape == small.get_parameter(key).shape
        if tensor.ndim < 2:
            assert set(tensor.unique().tolist()) <= set(start[key].unique().tolist()), "norms and biases start as in the base"
        elif tensor.shape != start[key].shape and tensor.numel() > 1000:
            cut += 1
            found, base = tensor.std(correction=0).item(), start[key].std(correction=0).item()
            ratios = [1.0, *(math.sqrt(start[key].shape[d] / tensor.shape[d]) for d in (0, 1))]
            assert any(found == pytest.approx(base * ratio, rel=0.1) for ratio in ratios)
            if name == "test_vit":
                assert found == pytest.approx(base, rel=0.1), "a fixed deviation stays, however wide the layer is"
    assert cut > 3
    assert fresh(torch.randn(1, 3, *fresh.pretrained_cfg["input_size"][1:])).isfinite().all()


@pytest.mark.parametrize(
    ("name", "weight", "dim", "gain"),
    [
        ("resnet18", "layer2.1.conv1.weight", 0, 2),  # as many inputs as outputs: its own deviation does not tell which of them counts
        ("resnet18", "layer2.1.conv1.weight", 1, 2),
        ("resnet18", "layer2.0.conv1.weight", 0, 2),  # half as many inputs: He's of outputs is LeCun's of inputs
        ("resnet18", "layer2.0.conv1.weight", 1, 2),
        ("mobilenetv2_050", "blocks.2.1.conv_pw.weight", 0, 2),
        ("mobilenetv2_050", "blocks.2.1.conv_pwl.weight", 1, 2),
    ],
)
def test_the_fan_is_the_architectures_not_one_tensors(name, weight, dim, gain):
    """timm draws these convolutions by their outputs (He et al. 2015, fan_out)."""
    model = timm.create_model(name, num_classes=10)
    layout = zc.analyze(model)
    axis = layout.params[weight][dim]
    small = reinitialize(zc.resize(model, layout, {axis: layout.axes[axis].size // 4})).get_parameter(weight)
    outs = small.shape[0] * small.shape[2] * small.shape[3]
    assert float(small.detach().std()) == pytest.approx((gain / outs) ** 0.5, rel=4 / (2 * small.numel()) ** 0.5)


def test_running_statistics_start_over():
    fresh = reinitialize(zc.prune(trained("test_resnet"), keep=0.5))
    norms = [module for module in fresh.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all((norm.running_mean == 0).all() and (norm.running_var == 1).all() for norm in norms)


def test_heads_of_exits_initialise_themselves_and_the_result_is_saved_by_name(tmp_path):
    net = zc.add_exits(zc.prune(trained("test_resnet"), keep=0.5), 2)
    with torch.no_grad():
        for parameter in net.exits.parameters():
            parameter.fill_(5.0)
    fresh = reinitialize(net)
    assert all(parameter.abs().max() < 5 for parameter in fresh.exits.parameters())
    zc.save(fresh, tmp_path / "m")
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in again.state_dict().items())


def test_what_timm_did_not_make_is_refused():
    with pytest.raises(CompressError, match=r"reinitialize: expected a model made by timm.*Linear"):
        reinitialize(nn.Linear(2, 2))

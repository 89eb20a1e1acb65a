"""Loading draws no random numbers for what it loads, and does for what it does not."""

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.plugin.skip_init import skip_init


def test_only_random_parameters_are_skipped():
    with skip_init():
        state = torch.get_rng_state()
        layer, norm = nn.Linear(64, 64), nn.BatchNorm1d(8)
        timm.layers.trunc_normal_(layer.weight, std=0.02)
        nn.init.kaiming_normal_(layer.weight)
        assert torch.equal(state, torch.get_rng_state())
        # What is not random is set, and buffers are as ever.
        nn.init.constant_(layer.bias, 2.0)
        norm.running_mean.normal_()
        nn.init.trunc_normal_(nn.Parameter(torch.empty(64)))  # draws until all fit
    assert (layer.weight == 0).all()
    assert (layer.bias == 2).all()
    assert (norm.weight == 1).all()
    assert not (norm.running_mean == 0).any()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_loading_draws_nothing_and_loads_everything(name, tmp_path):
    small = zc.prune(timm.create_model(name), macs=0.6).eval()
    zc.save(small, tmp_path)
    state = torch.get_rng_state()
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    expected = small.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    image = torch.randn(1, *small.pretrained_cfg["input_size"])
    assert torch.equal(again(image), small(image))
    if name == "test_resnet":
        torch.set_rng_state(state)
        zc.load(tmp_path)
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("changed", [{"num_classes": 7}, {"in_chans": 1}, {"num_classes": 0}])
def test_what_is_not_loaded_is_initialised(changed, tmp_path):
    """New classes and channels get the values that timm gives them, from the same seed as without the plugin's shortcut."""
    zc.save(zc.prune(timm.create_model("test_vit"), macs=0.6), tmp_path)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **changed).state_dict())
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in states[0].values())
    if changed.get("num_classes"):
        assert 0 < float(states[0]["head.weight"].std()) < 1

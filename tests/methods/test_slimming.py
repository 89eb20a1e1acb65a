"""Network slimming: the penalty is the one of the paper, scales fall with it, and one threshold cuts them."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch import nn

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.criteria import scores
from zoo_compress.methods.slimming import SlimmingConfig, SlimmingTask, scales


@pytest.fixture
def net():
    return timm.create_model("test_byobnet", num_classes=10)


def batch():
    return torch.randn(8, 3, 32, 32), torch.arange(8)


def test_the_gradient_is_the_losss_and_the_penaltys(net):
    other = copy.deepcopy(net)
    images, target = batch()
    with torch.no_grad():
        for scale in (*scales(net), *scales(other)):
            scale[::2] = -0.5
    ClassificationTask(other, verbose=False).train()(images, target)["loss"].backward()
    SlimmingTask(ClassificationTask(net, verbose=False), penalty=0.01).train()(images, target)["loss"].backward()
    names = {id(scale): name for name, scale in net.named_parameters()}
    own = {names[id(scale)] for scale in scales(net)}
    for (name, found), expected in zip(net.named_parameters(), other.parameters(), strict=True):
        wanted = expected.grad + 0.01 * found.detach().sign() if name in own else expected.grad
        torch.testing.assert_close(found.grad, wanted)


def test_scales_fall_with_the_penalty(net):
    sums = []
    for penalty in (1e-6, 0.5):
        model = copy.deepcopy(net)
        task = SlimmingConfig(penalty=penalty).task(ClassificationTask(SlimmingConfig().wrap(model), verbose=False), 0).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(0)
        for _ in range(10):
            optimizer.zero_grad()
            task(*batch())["loss"].backward()
            optimizer.step()
        sums.append(float(torch.cat([scale.detach().abs() for scale in scales(model)]).mean()))
    assert sums[1] < 0.9 * sums[0]


def test_one_threshold_cuts_all_layers(net):
    """Channels whose scales are small go, in whichever layer they are; `bn_scale` would take the same part of each."""
    with torch.no_grad():
        for i, scale in enumerate(scales(net)):
            scale.copy_(torch.linspace(0.5, 1, len(scale)) * (0.1 if i == 2 else 1.0))
    layout = zc.analyze(net)
    found = scores(net, layout, layout.free, "slimming")
    norms = {name.removesuffix(".weight"): p for name, p in net.named_parameters() if any(p is scale for scale in scales(net))}
    for axis, score in found.items():
        own = [p.detach().abs().numpy() for path, p in norms.items() if layout.params[f"{path}.weight"] == (axis,)]
        if own:
            np.testing.assert_allclose(score, np.mean(own, axis=0), rtol=1e-5)
    small_axis = layout.params[f"{list(norms)[2]}.weight"][0]
    pruned = zc.prune(net, macs=0.7, criterion="slimming", round_to=1)
    sizes = {axis: pruned.get_submodule(path).weight.numel() for path in norms for axis in layout.params[f"{path}.weight"]}
    share = {axis: sizes[axis] / layout.axes[axis].size for axis in sizes if axis in layout.axes}
    assert share[small_axis] == min(share.values()) < max(share.values())


def test_a_model_without_batchnorms_is_refused():
    with pytest.raises(CompressError, match="expected a model with BatchNorms that have scales, found VisionTransformer without"):
        SlimmingConfig().wrap(timm.create_model("test_vit"))
    with pytest.raises(CompressError, match="BatchNorms"):
        scales(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)))


@pytest.mark.parametrize("penalty", [0, -1.0, float("nan"), float("inf"), "much"])
def test_bad_penalties(penalty):
    with pytest.raises(CompressError):
        SlimmingConfig(penalty=penalty)

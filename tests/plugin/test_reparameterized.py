"""Blocks with several branches that timm can merge into one convolution: pruned before merging, after it, or created merged."""

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import zoo_compress as zc

# The smallest of each family; their widths do not depend on the image, so a small one does.
MODELS = {"repvgg_a0": {}, "mobileone_s0": {}, "fastvit_t8": {}, "repghostnet_050": {}, "repvit_m0_9": {}}
IMAGE = (2, 3, 64, 64)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = timm.create_model(request.param).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # fresh statistics would let branches be swapped unnoticed
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    return model


@pytest.fixture(scope="module")
def image():
    return torch.randn(*IMAGE, generator=torch.Generator().manual_seed(1))


def outputs(model, image):
    with torch.no_grad():
        return model.eval()(image)


def close(a, b):
    return float((a - b).norm() / b.norm()) < 1e-5


def test_prune_then_merge(model, image):
    small = zc.prune(model, macs=0.5, layout=zc.analyze(model, torch.empty(IMAGE)))
    merged = reparameterize_model(small)
    assert sum(1 for _ in merged.modules()) < sum(1 for _ in small.modules())
    assert close(outputs(merged, image), outputs(small, image))


def test_merge_then_prune(model, image):
    merged = reparameterize_model(model)
    layout = zc.analyze(merged, torch.empty(IMAGE))
    assert zc.verify(merged, layout, torch.empty(IMAGE)).permutation_error < 1e-9
    small = zc.prune(merged, macs=0.5, layout=layout)
    assert abs(zc.analyze(small, torch.empty(IMAGE)).macs() / layout.macs() - 0.5) <= 0.02
    assert torch.isfinite(outputs(small, image)).all()


def test_save_then_merge(model, image, tmp_path):
    small = zc.prune(model, macs=0.5, layout=zc.analyze(model, torch.empty(IMAGE)))
    zc.save(small, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(outputs(again, image), outputs(small, image))
    assert torch.equal(outputs(reparameterize_model(again), image), outputs(reparameterize_model(small), image))


@pytest.mark.parametrize("order", ["prune, merge", "merge, prune"])
def test_a_merged_model_is_not_saved_as_what_it_is_not(model, order, tmp_path):
    first, second = reparameterize_model, lambda m: zc.prune(m, macs=0.5, layout=zc.analyze(m, torch.empty(IMAGE)))
    if order == "prune, merge":
        first, second = second, first
    with pytest.raises(zc.CompressError, match=r"another model by this name .* save before blocks are merged"):
        zc.save(second(first(model)), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_created_merged(image, tmp_path):
    """`inference_mode=True` is an argument of the model, so its pruned form is saved and created again as such."""
    model = timm.create_model("fastvit_t8", inference_mode=True).eval()
    layout = zc.analyze(model, torch.empty(IMAGE))
    assert zc.verify(model, layout, torch.empty(IMAGE)).permutation_error < 1e-9
    small = zc.prune(model, macs=0.5, layout=layout)
    zc.save(small, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(outputs(again, image), outputs(small, image))

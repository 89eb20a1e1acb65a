"""The main road on real architectures: analyse, prove, prune to half the MACs, train a step, save, and create again by name."""

import pytest
import timm
import torch

import zoo_compress as zc

MODELS = """
resnet18 resnetv2_50d_gn resnest14d res2net50_26w_4s regnetx_002 skresnet18 densenet121 dpn48b dla34 hrnet_w18_small ese_vovnet19b_dw
efficientnet_b0 tf_efficientnet_lite0 mobilenetv2_100 mobilenetv3_small_050 ghostnet_050 mixnet_s convnext_atto vit_tiny_patch16_224
deit_tiny_patch16_224 swin_tiny_patch4_window7_224 mobilevit_xxs poolformer_s12 mixer_s32_224 beit_base_patch16_224
"""


@pytest.mark.parametrize("name", [*MODELS.split(), *timm.list_models("test_*", exclude_filters="*__*")])
def test_main_road(name, tmp_path):
    model = timm.create_model(name).eval()
    layout = zc.analyze(model)
    assert layout.num_params() == sum(p.numel() for p in model.parameters())
    # The largest takes its image at the size it was made for, in double precision, several times: the proof is the point.
    assert zc.verify(model, layout).permutation_error < 1e-6

    small = zc.prune(model, macs=0.5, layout=layout)
    pruned = zc.analyze(small)
    assert abs(pruned.macs() / layout.macs() - 0.5) <= 0.02

    image = torch.randn(2, *model.default_cfg["input_size"])
    small.train()
    small(image).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters() if p.requires_grad)
    small.eval()

    zc.save(small, tmp_path / "model")
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(image), small(image))

    backbone = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        features = backbone(image)
    channels_last = backbone.output_fmt == "NHWC" if hasattr(backbone, "output_fmt") else False
    assert [f.shape[-1 if channels_last else 1] for f in features] == backbone.feature_info.channels()

"""The main road on real architectures: analyse, prove, prune to half the MACs, train a step, save, and create again by name.

pytest tests/test_models.py                           a spread of architectures, in minutes
pytest tests/test_models.py --all-families            the smallest architecture of each of timm's model files, in an hour
pytest tests/test_models.py --models 'vit_*_dinov3'   any architectures
"""

from fnmatch import fnmatchcase

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo_compress as zc
from zoo_compress.coverage import macs_error
from zoo_compress.surgery.verify import flat, random_widths

MODELS = """
resnet18 resnetv2_50d_gn resnest14d res2net50_26w_4s regnetx_002 skresnet18 densenet121 dpn48b dla34 hrnet_w18_small ese_vovnet19b_dw
efficientnet_b0 tf_efficientnet_lite0 mobilenetv2_100 mobilenetv3_small_050 ghostnet_050 mixnet_s convnext_atto vit_tiny_patch16_224
deit_tiny_patch16_224 swin_tiny_patch4_window7_224 mobilevit_xxs poolformer_s12 mixer_s32_224 beit_base_patch16_224
"""

FAMILIES = """
beit_base_patch16_224 cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_1024_20_ks9_p14 cpubone_nano crossvit_tiny_240
cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224
fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 haloregnetz_b hardcorenas_a hgnetv2_b0 hiera_tiny_224
hieradet_small hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18
legacy_xception levit_128s lowformer_b0 mixer_s32_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny
naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small pit_ti_224 pnasnet5large poolformer_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny
regnetx_002 repghostnet_050 repvit_m0_9 res2net50_48w_2s resnest14d resnetv2_18 rexnet_100 samvit_base_patch16_224 selecsls42
sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
test_byobnet test_coatnet test_convnext test_mambaout test_nfnet test_resnet test_vit test_vit_relpos tiny_vit_5m_224 tinynet_e
tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41
xcit_nano_12_p16_224
"""
"""The architecture with the fewest MACs of each of timm's model files, from the table that `zoo-compress coverage --all` writes."""


def names(config: pytest.Config) -> list[str]:
    registered = timm.list_models(exclude_filters="*__*")
    if chosen := config.getoption("models"):
        return [name for name in registered if any(fnmatchcase(name, glob) for glob in chosen)]
    if config.getoption("all_families"):
        return FAMILIES.split()
    return [*MODELS.split(), *(name for name in registered if name.startswith("test_"))]


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names(metafunc.config))


def test_every_model_file_is_in_the_families():
    files = {timm.models.model_entrypoint(name).__module__ for name in timm.list_models(exclude_filters="*__*")}
    assert {timm.models.model_entrypoint(name).__module__ for name in FAMILIES.split()} == files


def test_main_road(name, tmp_path):
    model = timm.create_model(name).eval()
    layout = zc.analyze(model)
    assert layout.num_params() == sum(p.numel() for p in model.parameters())
    # The largest takes its image at the size it was made for, in double precision, several times: the proof is the point.
    assert zc.verify(model, layout).permutation_error < 1e-6
    with torch.device("meta"):
        assert macs_error(timm.create_model(name).eval(), layout) <= 1e-3

    small = zc.prune(model, macs=0.5, layout=layout)
    pruned = zc.analyze(small)
    assert abs(pruned.macs() / layout.macs() - 0.5) <= 0.02

    image = torch.randn(2, *model.default_cfg["input_size"])
    small.train()
    flat(small(image)).sum().backward()
    assert all(p.grad.shape == p.shape for p in small.parameters() if p.grad is not None)
    assert without_gradient(small) <= without_gradient_in_base(model, image, small)
    small.eval()

    with torch.no_grad():
        expected = small(image)
    zc.save(small, tmp_path / "model")
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(image), expected)

    if has_features(name):
        backbone = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, features_only=True).eval()
        with torch.no_grad():
            features = backbone(image)
        channels_last = backbone.output_fmt == "NHWC" if hasattr(backbone, "output_fmt") else False
        assert [f.shape[-1 if channels_last else 1] for f in features] == backbone.feature_info.channels()


@pytest.mark.parametrize("architecture", timm.list_models("test_*", exclude_filters="*__*"))
def test_macs_are_what_a_counter_counts_on_a_processor(architecture):
    """There, fused attention is one operation that torch's counter does not know, and which attention is fused is torch's choice."""
    model = timm.create_model(architecture).eval().requires_grad_(False)
    layout = zc.analyze(model)
    widths = random_widths(layout, np.random.default_rng(1))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        zc.resize(model, layout, widths)(torch.randn(1, *model.default_cfg["input_size"]))
    low, high = (layout.macs(widths, fused_attention=fused) for fused in (False, True))
    assert 0.999 * low <= counter.get_total_flops() / 2 <= 1.001 * high


def without_gradient(model):
    return {name for name, p in model.named_parameters() if p.grad is None}


def without_gradient_in_base(model, image, small):
    """Parameters that the base's training does not reach either; asked only where there is a question."""
    if not without_gradient(small):
        return set()
    model.train()
    flat(model(image)).sum().backward()
    model.eval()
    return without_gradient(model)


def has_features(name):
    """Whether timm gives features of this architecture at all."""
    try:
        with torch.device("meta"):
            timm.create_model(name, features_only=True)
    except (AttributeError, RuntimeError, AssertionError, KeyError, TypeError, ValueError, NotImplementedError):
        return False
    return True


def test_a_pruned_naflex_model_still_takes_patches():
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3, num_classes=10).eval()
    layout = zc.analyze(model)
    zc.verify(model, layout)
    small = zc.prune(model, macs=0.5, layout=layout)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(5)).expand(2, -1, -1)
    valid = torch.arange(15) < torch.tensor([[15], [11]])
    with torch.no_grad():
        out = small({"patches": torch.randn(2, 15, 16 * 16 * 3), "patch_coord": places, "patch_valid": valid})
    assert out.shape == (2, 10)

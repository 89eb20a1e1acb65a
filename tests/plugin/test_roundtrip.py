"""What is saved is what comes back: to the bit, or it is refused with the module that differs and what to do."""

import copy
import json

import pytest
import timm
import torch
from timm.layers import FrozenBatchNormAct2d
from timm.utils.model import FrozenBatchNorm2d
from torch import nn

import zoo_compress as zc
from zoo_compress.structure.variant import Variant

COMPRESS = {"plain": lambda m: m, "pruned": lambda m: zc.prune(m, macs=0.6), "sparse": lambda m: zc.sparsify(m, density=0.5)}


def made(name="test_resnet", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 10, **kwargs}).eval()


def again(model, folder):
    zc.save(model, folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def images(model, n=2):
    parameter = next(model.parameters())
    size = timm.models.get_model_input_config(model)["input_size"]
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(1)).to(parameter.dtype)


def first(model, kind):
    return next((path, m) for path, m in model.named_modules() if isinstance(m, kind))


def activation(model):
    path, _ = first(model.layer2, nn.ReLU)
    model.layer2.set_submodule(path, nn.LeakyReLU(0.1))
    return f"layer2.{path}"


def clipped(model):
    path, _ = first(model.layer3, nn.ReLU)
    model.layer3.set_submodule(path, nn.ReLU6())
    return f"layer3.{path}"


def epsilon(model):
    path, module = first(model.layer1, nn.BatchNorm2d)
    module.eps = 2e-5
    return f"layer1.{path}"


def stride(model):
    model.layer1[0].conv1.stride = (2, 2)
    model.layer1[0].conv2.stride = (1, 1)
    model.layer1[0].downsample = None
    return "layer1.0"


def padding(model):
    model.layer2[0].conv2.padding_mode = "circular"
    model.layer2[0].conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return "layer2.0.conv2"


def identity(model):
    model.maxpool = nn.Identity()
    return "maxpool"


def pooling(model):
    model.global_pool.pool = nn.AdaptiveMaxPool2d(1)
    return "global_pool"


def method(model):
    model.forward_head = lambda x, pre_logits=False: model.fc(model.global_pool(x)) * 2
    return "the ResNet"


CHANGES = [activation, clipped, epsilon, padding, identity, pooling]


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_no_file_holds_is_refused_by_the_name_of_its_module(change, compress, tmp_path):
    model = made()
    path = change(model)
    small = COMPRESS[compress](model)
    with pytest.raises(zc.CompressError, match=rf"{path}\b.*reset_classifier") as error:
        zc.save(small, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", [nn.Linear(96, 37), nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 10)), nn.Identity()])
@pytest.mark.parametrize("compress", ["plain", "pruned"])
def test_a_replaced_head_is_refused(head, compress, tmp_path):
    model = made()
    model.fc = copy.deepcopy(head)
    small = COMPRESS[compress](model)
    with pytest.raises(zc.CompressError, match=r"fc.*(reset_classifier|num_classes=)"):
        zc.save(small, tmp_path / "out")


def test_a_method_of_the_models_own_is_refused(tmp_path):
    model = made()
    method(model)
    with pytest.raises(zc.CompressError, match="the ResNet"):
        zc.save(model, tmp_path)


def test_a_change_in_a_branch_that_adds_nothing_yet_is_seen(tmp_path):
    """Residual branches begin at zero: the output alone tells nothing of what is inside."""
    model = made("resnet18")
    nn.init.zeros_(model.layer3[1].bn2.weight)
    nn.init.zeros_(model.layer3[1].bn2.bias)
    before = model(images(model))
    model.layer3[1].act1 = nn.LeakyReLU(0.5)
    assert torch.equal(model(images(model)), before)
    with pytest.raises(zc.CompressError, match=r"layer3\.1\.act1 \(LeakyReLU\) comes back as ReLU"):
        zc.save(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_eps_is_seen_behind_a_coarse_precision(dtype, tmp_path):
    model = made().to(dtype)
    path = epsilon(model)
    with pytest.raises(zc.CompressError, match=rf"{path}\.eps"):
        zc.save(model, tmp_path)


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_precision_and_memory_format_is_saved(compress, dtype, layout, tmp_path):
    small = COMPRESS[compress](made()).to(dtype).to(memory_format=layout)
    found = again(small, tmp_path).to(dtype).to(memory_format=layout)
    with torch.no_grad():
        assert torch.equal(found(images(small)), small(images(small)))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {"in_chans": 5}),
        ("test_vit", {"img_size": 96}),
        ("test_vit", {"dynamic_img_size": True}),
        ("test_resnet", {"num_classes": 0}),
        ("test_resnet", {"global_pool": "max"}),
        ("test_efficientnet", {"drop_rate": 0.3, "drop_path_rate": 0.2}),
        ("test_resnet", {"act_layer": "gelu"}),
    ],
)
@pytest.mark.parametrize("compress", ["plain", "pruned"])
def test_models_made_with_arguments_are_saved(name, kwargs, compress, tmp_path):
    small = COMPRESS[compress](made(name, **kwargs))
    found = again(small, tmp_path)
    with torch.no_grad():
        assert torch.equal(found(images(small)), small(images(small)))


@pytest.mark.parametrize("compress", COMPRESS)
def test_how_attention_is_computed_is_no_part_of_a_model(compress, tmp_path):
    """timm switches it for the whole process: the same function, rounded in another way."""
    model = made("test_vit")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = not module.fused_attn
    small = COMPRESS[compress](model)
    with torch.no_grad():
        torch.testing.assert_close(again(small, tmp_path)(images(small)), small(images(small)))


def test_saving_leaves_no_trace(tmp_path):
    model = made().train()
    model.layer1.eval()
    modes = {path: module.training for path, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys = {path: sorted(vars(module)) for path, module in model.named_modules()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    zc.save(model, tmp_path)
    assert torch.equal(torch.rand(3), expected), "the user's random numbers go on"
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_momentum_that_is_lost_is_said(tmp_path, caplog):
    model = made()
    model.bn1.momentum = 0.01
    zc.save(model, tmp_path)
    assert "bn1.momentum is 0.01, and comes back as 0.1" in caplog.text


def test_dropout_that_is_no_longer_there_is_none_of_a_files_business(tmp_path):
    model = made("test_efficientnet", drop_path_rate=0.2)
    for path, module in list(model.named_modules()):
        if "drop_path" in path:
            model.set_submodule(path, nn.Identity())
        module.training = False
    found = again(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(found(images(model)), model(images(model)))


def test_draws_from_torch_are_the_same_on_both_sides(tmp_path):
    model = made()
    model.fc.forward = lambda x: nn.functional.linear(x + torch.rand_like(x), model.fc.weight, model.fc.bias)
    with pytest.raises(zc.CompressError, match="fc"):
        zc.save(model, tmp_path)


def test_a_model_that_never_gives_the_same_is_said_not_to_be_compared(tmp_path, caplog, monkeypatch):
    import random

    from timm.models.resnet import ResNet

    plain = ResNet.forward
    monkeypatch.setattr(ResNet, "forward", lambda self, x: plain(self, x) + random.random())
    zc.save(made(), tmp_path)
    assert "gives something else each time it runs" in caplog.text


# Frozen BatchNorms


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize(
    ("name", "kind", "where"), [("test_resnet", FrozenBatchNorm2d, "layer1"), ("test_efficientnet", FrozenBatchNormAct2d, "blocks.0")]
)
def test_frozen_batchnorms_come_back_frozen(compress, name, kind, where, tmp_path):
    model = made(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    timm.utils.freeze(model, ["bn1", where])
    small = COMPRESS[compress](model).eval()
    frozen = [path for path, module in small.named_modules() if isinstance(module, kind)]
    assert len(frozen) > 1
    found = again(small, tmp_path)
    assert [path for path, module in found.named_modules() if isinstance(module, kind)] == frozen
    with torch.no_grad():
        assert torch.equal(found(images(small)), small(images(small)))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, features_only=False)
    assert isinstance(other.bn1, kind)
    timm.utils.unfreeze(found)
    back = again(found, tmp_path / "thawed")
    assert not any(isinstance(module, kind) for module in back.modules())


def test_a_record_freezes_batchnorms_of_the_base_only(tmp_path):
    model = made()
    timm.utils.freeze(model, ["bn1"])
    zc.save(model, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["model_args"]["variant"]["frozen"] == ["bn1"]
    for wrong in (["conv1.0"], ["nowhere"], ["bn1.__class__"]):
        config["model_args"]["variant"]["frozen"] = wrong
        path.write_text(json.dumps(config))
        with pytest.raises(zc.CompressError, match="frozen"):
            zc.load(tmp_path)
    with pytest.raises(zc.VariantError, match="frozen"):
        Variant.from_dict({**config["model_args"]["variant"], "frozen": "bn1"})


@pytest.mark.parametrize("whole", [False, True])
def test_every_method_takes_a_model_with_frozen_batchnorms(whole):
    model = made("resnet18")
    timm.utils.freeze(model, [] if whole else ["bn1", "layer1"])
    x = images(model)
    layout = zc.analyze(model)
    zc.verify(model, layout)
    for small in (
        zc.prune(model, macs=0.6, reconstruct=[x], criterion="thinet"),
        zc.prune(model, macs=0.6, criterion="bn_scale" if not whole else "l2"),
        zc.sparsify(model, density=0.5),
        zc.cluster(model, bits=4),
        zc.factorize(model, macs=0.8),
        zc.reinitialize(model),
        zc.quantize(model),
        zc.add_exits(model, 1),
        zc.calibrate(copy.deepcopy(model), [x]),
    ):
        small.train()(x)
    zc.measure(model, runs=1, warmup=1)
    zc.residual_blocks(model)


# Parts, wrappers and backbones


class Wrapper(nn.Module):
    """A user's model with one of timm's inside, which copies what that says of itself."""

    def __init__(self, name="test_resnet", **kwargs):
        super().__init__()
        self.backbone = made(name, **{"num_classes": 0, **kwargs})
        self.head = nn.Linear(self.backbone.num_features, 7)

    def forward(self, x):
        return self.head(self.backbone(x))


class Copies(Wrapper):
    def __init__(self):
        super().__init__()
        self.pretrained_cfg, self.num_classes = self.backbone.pretrained_cfg, 7


class HandsOn(Wrapper):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_a_part_of_a_pruned_whole_is_saved(name, tmp_path):
    whole = Wrapper(name).eval()
    x = images(whole.backbone)
    small = zc.prune(whole, macs=0.6, layout=zc.analyze(whole, x))
    part = small.backbone
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in whole.backbone.parameters())
    found = again(part, tmp_path / "once")
    with torch.no_grad():
        assert torch.equal(found(x), part(x))
    assert whole.backbone.pretrained_cfg["architecture"] == name, "what was given is left as it was"
    smaller = zc.prune(small, macs=0.8, layout=zc.analyze(small, x)).backbone
    found = again(smaller, tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(found(x), smaller(x))


def test_a_part_whose_classes_were_pruned_is_refused_or_right(tmp_path):
    whole = nn.Sequential(made(num_classes=64), nn.ReLU(), nn.Linear(64, 5)).eval()
    x = images(whole[0])
    part = zc.prune(whole, macs=0.5, round_to=1, scope="local", layout=zc.analyze(whole, x))[0]
    assert part(x).shape[1] < 64
    with pytest.raises(zc.CompressError, match="classes"):
        zc.save(part, tmp_path)


@pytest.mark.parametrize("kind", [Wrapper, Copies, HandsOn])
def test_a_wrapper_is_not_what_timm_made(kind, tmp_path):
    model = kind().eval()
    x = images(model.backbone)
    small = zc.prune(model, macs=0.6, layout=zc.analyze(model, x))
    assert small(x).shape == (2, 7)
    assert "_model_args" not in vars(small)
    with pytest.raises(zc.CompressError, match=r"save.*inside"):
        zc.save(small, tmp_path / "whole")
    found = again(small.backbone, tmp_path / "part")
    with torch.no_grad():
        assert torch.equal(found(x), small.backbone(x))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_byobnet"])
def test_backbones_made_with_features_only(name, tmp_path):
    model = timm.create_model(name, features_only=True).eval()
    x = torch.randn(2, 3, *timm.create_model(name).pretrained_cfg["input_size"][1:])
    layout = zc.analyze(model, x)
    zc.verify(model, layout, x)
    for compress in (
        lambda m: zc.prune(m, macs=0.6, layout=layout),
        lambda m: zc.prune(m, macs=0.6, layout=layout, reconstruct=[x]),
        lambda m: zc.sparsify(m, density=0.5),
        lambda m: zc.cluster(m, bits=4),
        zc.quantize,
        zc.reinitialize,
    ):
        small = compress(model)
        with torch.no_grad():
            assert [m.shape[1] for m in small.eval()(x)] == small.feature_info.channels()
        with pytest.raises(zc.CompressError, match="features_only=True"):
            zc.save(small, tmp_path)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: zc.prune(m, macs=0.6)(x),
        lambda m, x: zc.factorize(m, macs=0.9)(x),
        lambda m, x: zc.measure(m, runs=1, warmup=1).macs,
        lambda m, x: zc.residual_blocks(m),
        lambda m, x: zc.calibrate(copy.deepcopy(m), [x])(x),
        lambda m, x: zc.verify(m, zc.analyze(m)),
    ],
)
def test_backbones_know_what_they_take(call):
    model = timm.create_model("resnet18", features_only=True, out_indices=(2, 4)).eval()
    assert call(model, torch.randn(2, 3, 64, 64))


# Networks with knobs


def test_networks_with_knobs_are_compared_at_their_settings(tmp_path):
    net = zc.slim(made(), widths=(0.5, 1.0)).eval()
    net.set_width(0.5)
    found = again(net, tmp_path / "slim")
    for width in (0.5, 1.0):
        net.set_width(width), found.set_width(width)
        with torch.no_grad():
            assert torch.equal(found(images(net)), net(images(net)))
    net.set_width(0.5)
    net.bn1.eps = 1e-3
    with pytest.raises(zc.CompressError, match=r"bn1\.eps"):
        zc.save(net, tmp_path / "other")
    assert net.sizes == net.sizes_at(0.5)[0], "the chosen width stays"

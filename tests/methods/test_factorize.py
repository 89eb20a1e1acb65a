"""Factorising and separating: budgets are met, what is left has a reason, data helps on what it is of."""

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.factorize import FactorizeConfig
from zoo_compress.methods.separate import SeparateConfig


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(3)
    # Smooth images: neighbouring pixels are alike, as in photos.
    small = torch.randn(32, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(small, scale_factor=8, mode="bilinear")


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10).eval()


@pytest.mark.parametrize(("name", "dtype"), [("test_vit", torch.bfloat16), ("test_resnet", torch.float16), ("test_resnet", torch.bfloat16)])
def test_a_model_of_any_precision_bears_what_it_bears_in_single(name, dtype):
    """Its rounding is no reason to leave a layer; what comes of it is in its precision."""
    model = timm.create_model(name, num_classes=10).eval()
    plan = zc.plan_factorize(model, macs=0.8, scope="local")
    images = torch.randn(4, *model.pretrained_cfg["input_size"])
    model.to(dtype)
    for data in (None, [images]):
        half = zc.plan_factorize(model, macs=0.8, scope="local", data=data)
        assert (half.factors.keys(), half.left) == (plan.factors.keys(), plan.left)
    small = zc.factorize(model, macs=0.8, data=[images]).eval()
    assert {p.dtype for p in small.parameters()} == {dtype}
    with torch.no_grad():
        assert small(images.to(dtype)).isfinite().all()


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("share", [0.8, 0.6])
def test_budgets_are_met(vit, kind, scope, share):
    before, after = zc.analyze(vit), zc.analyze(zc.factorize(vit, **{kind: share}, scope=scope))
    cost = {"macs": after.macs() / before.macs(), "params": after.num_params() / before.num_params()}
    assert share - 0.02 <= cost[kind] <= share


def test_a_count_is_a_budget_too(model, layout):
    wanted = int(layout.macs() * 0.75)
    assert wanted - 0.02 * layout.macs() <= zc.analyze(zc.factorize(model, macs=wanted)).macs() <= wanted


@pytest.mark.parametrize("scheme", ["auto", "spatial", "channel"])
def test_a_plan_is_what_comes_out(model, layout, scheme):
    plan = zc.plan_factorize(model, macs=0.7, scheme=scheme)
    found = zc.analyze(zc.factorize(model, macs=0.7, scheme=scheme))
    assert plan.macs == (layout.macs(), found.macs())
    assert plan.params == (layout.num_params(), found.num_params())
    assert {f.kind for f in plan.factors.values()} <= ({"spatial", "channel", "svd"} if scheme == "auto" else {scheme, "svd"})
    dense = {path for path, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert plan.factors.keys() | plan.left.keys() == dense
    assert all(reason in str(plan) for reason in plan.left.values())


def test_energy_is_kept_in_every_layer(vit):
    plan = zc.plan_factorize(vit, energy=0.6, round_to=1)
    small = zc.factorize(vit, energy=0.6, round_to=1)
    for path, factor in plan.factors.items():
        values = torch.linalg.svdvals(vit.get_submodule(path).weight.detach()).square().cumsum(0)
        share = values / values[-1]
        assert float(share[factor.rank - 1]) == pytest.approx(plan.kept[path], abs=1e-5)
        assert share[factor.rank - 1] >= 0.6 > share[factor.rank - 2]
        assert small.get_submodule(path)[0].weight.shape[0] == factor.rank
    assert plan.factors
    with pytest.raises(CompressError, match="no layer of VisionTransformer gets cheaper"):
        zc.factorize(vit, energy=1.0)


def test_ranks_are_multiples_where_there_are_enough(vit):
    plan = zc.plan_factorize(vit, macs=0.7, round_to=4)
    assert all(factor.rank % 4 == 0 for factor in plan.factors.values())


def test_data_keeps_more_of_what_the_network_gives(vit, images):
    """Weights with structure, as training leaves them: inputs that hardly vary matter less than those that do."""
    with torch.no_grad():
        expected = vit(images)
        found = {
            name: zc.factorize(vit, macs=0.7, data=data, round_to=1).eval()(images)
            for name, data in (("weights", None), ("data", [images]))
        }
    error = {name: float((out - expected).norm() / expected.norm()) for name, out in found.items()}
    assert error["data"] < 0.7 * error["weights"], error


def test_data_keeps_more_in_separable_convolutions(images):
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10).eval()
    zc.calibrate(net, [images])
    with torch.no_grad():
        expected = net(images)
        found = [zc.separate(net, data=data).eval()(images) for data in (None, [(images, torch.zeros(32))])]
    by_weight, by_data = (float((out - expected).norm() / expected.norm()) for out in found)
    assert by_data < by_weight


def test_excluded_layers_stay(model):
    plan = zc.plan_factorize(model, macs=0.8, exclude="layer1.*")
    assert not any(path.startswith("layer1") for path in plan.factors)
    assert plan.left["layer1.0.conv1"] == "excluded"


def test_the_model_stays_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = zc.factorize(model, macs=0.7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not {t.data_ptr() for t in small.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}


@pytest.mark.parametrize("change", [lambda m: zc.factorize(m, macs=0.8), zc.separate], ids=["factorize", "separate"])
def test_nothing_is_drawn_from_the_callers_generator(model, change):
    before = torch.get_rng_state()
    change(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_separable_convolutions_are_depthwise_and_pointwise(model):
    plan, small = zc.plan_separate(model), zc.separate(model)
    for path in plan.factors:
        deep, point = small.get_submodule(path)
        assert deep.groups == deep.in_channels == deep.out_channels
        assert point.kernel_size == (1, 1)
    assert all(
        m.groups > 1 or m.kernel_size == (1, 1) or path in plan.left for path, m in small.named_modules() if isinstance(m, nn.Conv2d)
    )
    wide = zc.separate(model, multiplier=2)
    assert wide.get_submodule(path)[0].out_channels == 2 * deep.in_channels


def test_gradients_reach_both_layers(model):
    small = zc.factorize(model, macs=0.7).train()
    small(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_a_network_with_nothing_to_separate_says_why(vit):
    with pytest.raises(CompressError, match="there are no separable factors of such a layer"):
        zc.separate(vit)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: zc.factorize(m), "exactly one of macs, params and energy, found none"),
        (lambda m: zc.factorize(m, macs=float("nan")), "macs is a fraction"),
        (lambda m: zc.factorize(m, macs=True), "macs is a fraction"),
        (lambda m: zc.factorize(m, macs=0.7, data=[]), "at least one batch"),
        (lambda m: zc.separate(m, macs=0.7, params=0.7), "found both"),
        (lambda m: zc.separate(m, multiplier=0), "positive integer"),
        (lambda m: zc.separate(m, multiplier=99), "two layers would not have fewer MACs"),
        (lambda m: zc.factorize(nn.Linear(3, 3), macs=0.5), "example_input"),
    ],
)
def test_bad_arguments(model, call, message):
    with pytest.raises(CompressError, match=message):
        call(model)


def test_stages_of_recipes(model, images):
    batches = [(images, torch.zeros(32, dtype=torch.long))]
    small = FactorizeConfig(macs=0.7, data=True).apply(model, batches, 0)
    assert zc.analyze(small).macs() <= 0.7 * zc.analyze(model).macs()
    assert SeparateConfig().apply(model, batches, 0).pretrained_cfg["architecture"] == "test_resnet__separable"
    for config, settings in (
        (FactorizeConfig, {}),
        (FactorizeConfig, {"macs": 0.5, "energy": 0.5}),
        (SeparateConfig, {"macs": 1, "params": 1}),
    ):
        with pytest.raises(CompressError, match=rf"^{config.__name__}: expected"):
            config(**settings)


@pytest.mark.parametrize("scheme", ["auto", "spatial", "channel"])
def test_layers_without_weights_left(scheme, images):
    """Blocks that begin switched off, or layers that sparsifying emptied."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    with torch.no_grad():
        for path in ("layer2.0.conv2", "layer3.0.conv1"):
            model.get_submodule(path).weight.zero_()
    for data in (None, [images]):
        low = zc.factorize(model, macs=0.8, scheme=scheme, data=data)
        assert low.eval()(images).isfinite().all()
    assert zc.separate(model, data=[images]).eval()(images).isfinite().all()

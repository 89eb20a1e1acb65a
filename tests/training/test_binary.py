"""Weights of one bit: the nearest ones, gradients that go straight through, and files of one bit a weight."""

import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.binary import BinaryConfig, TernaryConfig, binary_values, ternary_values
from zoo_compress.surgery.weights import ends, layer_weights
from zoo_compress.training.config import TrainConfig
from zoo_compress.training.loop import Phase, evaluate, fit

CONFIGS = {"binary": BinaryConfig(), "ternary": TernaryConfig()}
VALUES = {"binary": 2, "ternary": 3}


def test_binary_values_are_the_nearest():
    weight = torch.randn(40, 30)
    found = binary_values(weight)
    assert set(found.unique().tolist()) == {-found.max().item(), found.max().item()}
    assert ((found > 0) == (weight >= 0)).all()
    error = (weight - found).square().sum()
    for scale in (0.9, 1.1):
        assert (weight - scale * found).square().sum() > error


def test_ternary_values_are_about_the_nearest():
    weight = torch.randn(200, 300)
    found = ternary_values(weight)
    assert len(found.unique()) == 3
    error = (weight - found).square().sum()
    for scale in (0.95, 1.05):
        assert (weight - scale * found).square().sum() > error, "the scale is the best for this threshold"
    for threshold in (0.4, 1.0):
        large = weight.abs() > threshold * weight.abs().mean()
        other = torch.where(large, weight.sign() * weight[large].abs().mean(), 0)
        assert (weight - other).square().sum() > error


@pytest.mark.parametrize("values", [binary_values, ternary_values])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_layers_in_half_precision(values, dtype):
    """Of so many weights neither the sum nor the number fits into float16."""
    weight = torch.randn(1500, 1500)
    found, expected = values(weight.to(dtype)), values(weight)
    assert found.dtype == dtype
    assert found.max().item() == pytest.approx(expected.max().item(), rel=0.01)


@pytest.mark.parametrize("kind", CONFIGS)
class TestTraining:
    def test_layers_that_share_a_weight_share_its_values(self, kind, make_model):
        tied = make_model()
        tied.layer1[0].conv2.weight = tied.layer1[0].conv1.weight
        net = CONFIGS[kind].wrap(tied)
        first, second = net.layer1[0].conv1, net.layer1[0].conv2
        assert torch.equal(first.weight, second.weight)
        assert len(second.weight.unique()) == VALUES[kind]
        images = torch.randn(2, *net.pretrained_cfg["input_size"])
        expected = net.eval()(images)
        plain = CONFIGS[kind].finish(net, ())
        assert plain.layer1[0].conv1.weight is plain.layer1[0].conv2.weight
        torch.testing.assert_close(plain(images), expected)

    def test_the_gradient_goes_straight_through(self, kind, make_model):
        net = CONFIGS[kind].wrap(make_model())
        layer = net.layer1[0].conv1
        images, target = torch.randn(4, *net.pretrained_cfg["input_size"]), torch.arange(4)
        weight = layer.weight.detach().requires_grad_()
        seen = {}
        layer.register_forward_hook(lambda m, i, o: seen.update(x=i[0].detach()) or (o.register_hook(lambda g: seen.update(g=g)) and None))
        F.cross_entropy(net.eval()(images), target).backward()
        F.conv2d(seen["x"], weight, None, layer.stride, layer.padding).backward(seen["g"])
        assert torch.allclose(layer.parametrizations.weight.original.grad, weight.grad, rtol=1e-4, atol=1e-7)

    def test_trains_ends_plain_and_resumes_to_the_same_bits(self, kind, tmp_path, make_model, make_loaders):
        method, config = CONFIGS[kind], TrainConfig(epochs=2, lr=3e-3, ema_decay=0.9)

        def trained(**options):
            net = method.wrap(make_model())
            history = fit(net, *make_loaders(), config, phase=Phase("phase", 2, seed=7, run="this"), method=method, **options)
            return method.finish(net, ()), history

        whole, history = trained()
        plain = make_model()
        assert whole.state_dict().keys() == plain.state_dict().keys()
        assert [n for n, _ in whole.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert all(type(a) is type(b) for a, b in zip(whole.modules(), plain.modules(), strict=True))
        for name, weight in layer_weights(whole).items():
            assert (len(weight.unique()) <= VALUES[kind]) == (name not in ends(whole))
        assert whole.pretrained_cfg["architecture"] == f"test_resnet__{kind}"
        assert evaluate(whole, make_loaders()[1])["top1"] == history[-1].top1
        zc.save(whole, tmp_path / "model")
        again = zc.load(tmp_path / "model")
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))

        def stop(line):
            raise KeyboardInterrupt

        state = tmp_path / "state.safetensors"
        with pytest.raises(KeyboardInterrupt):
            trained(state=state, log=stop)
        resumed, later = trained(state=state)
        assert [e.train_loss for e in later] == [e.train_loss for e in history]
        assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True))

    def test_fine_tuning_keeps_the_bits(self, kind, make_model, make_loaders):
        net = zc.quantize(make_model(), kind)
        fit(net, *make_loaders(), TrainConfig(epochs=1, lr=1e-3, weight_decay=0.1))
        assert all(len(w.unique()) <= VALUES[kind] for n, w in layer_weights(net).items() if n not in ends(net))

    def test_a_bit_a_weight_in_the_file(self, kind, tmp_path):
        net = timm.create_model(f"test_resnet__{kind}", num_classes=10)
        zc.save(net, tmp_path)
        names = net._model_args["variant"]["packed"].keys()
        elements = sum(net.get_parameter(name).numel() for name in names)
        rest = sum(value.nbytes for name, value in net.state_dict().items() if name not in names)
        size = (tmp_path / "model.safetensors").stat().st_size
        header = 150 * (len(net.state_dict()) + 3 * len(names))
        # Ternary: the entropy of three values used about evenly, log2(3) bits, plus what coding place and sign apart costs.
        assert rest + elements / 8 < size < rest + (1 if kind == "binary" else 1.62) * elements / 8 + header


def test_real_numbers_stay_within_one(make_model):
    net = BinaryConfig().wrap(make_model())
    with torch.no_grad():
        net.layer1[0].conv1.parametrizations.weight.original[0, 0, 0, 0] = 7.0
    task = BinaryConfig().task(ClassificationTask(net, verbose=False), 0)
    task.train()(torch.randn(2, *net.pretrained_cfg["input_size"]), torch.arange(2))
    assert net.layer1[0].conv1.parametrizations.weight.original.max() == 1.0


def test_which_layers(model):
    assert "fc.weight" not in zc.quantize(model)._model_args["variant"]["packed"]
    every = zc.quantize(model, "ternary", exclude=[])
    assert every._model_args["variant"]["packed"].keys() == layer_weights(model).keys()
    assert not any(parametrize.is_parametrized(m) for m in every.modules())
    assert isinstance(every.fc, nn.Linear)
    with pytest.raises(CompressError, match="'nothing' matches none"):
        zc.quantize(model, exclude=["nothing"])
    with pytest.raises(CompressError, match="kind: expected binary or ternary, found 'int8'"):
        zc.quantize(model, "int8")
    with pytest.raises(CompressError, match=r"^kind: expected binary or ternary, found \['binary'\]"):
        zc.quantize(model, ["binary"])
    with pytest.raises(CompressError, match="binary: expected a model without removed or shared weights"):
        zc.quantize(zc.sparsify(model, density=0.5))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(kind, value, make_model):
    """Of such a layer nothing but infinities, or zeros, would be left."""
    net = make_model()
    with torch.no_grad():
        net.layer1[0].conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(CompressError, match=rf"^{kind}: 'layer1\.0\.conv1\.weight': expected finite weights"):
        zc.quantize(net, kind)

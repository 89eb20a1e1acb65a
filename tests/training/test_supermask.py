"""Supermasks: scores are trained, weights are not, and what is found is a sparse network like any other."""

import math

import pytest
import timm
import torch
from torch.nn.utils import parametrize

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.supermask import SupermaskConfig
from zoo_compress.surgery.masks import masks_of
from zoo_compress.surgery.weights import layer_weights
from zoo_compress.training.config import TrainConfig
from zoo_compress.training.loop import evaluate, fit

CONFIG = TrainConfig(epochs=3, opt="sgd", lr=0.1, weight_decay=0.0)


def found_in(model, loaders, config=CONFIG, method=None, **kwargs):
    method = method or SupermaskConfig(density=0.4)
    net = method.wrap(model)
    history = fit(net, *loaders, config, method=method, **kwargs)
    return method.finish(net, ()), history


def test_finds_a_network_without_training_a_weight(make_model, make_loaders, digits, tmp_path):
    start = dict(make_model().named_parameters())
    model, history = found_in(make_model(), make_loaders(digits))
    assert history[-1].top1 > 85
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    masks = masks_of(model)
    for name, weight in layer_weights(model).items():
        expected = start[name].sign() * math.sqrt(2 / weight[0].numel())
        assert torch.equal(weight[masks[name]], expected[masks[name]])
        assert int(masks[name].sum()) == round(0.4 * weight.numel())
    _, test = make_loaders(digits)
    assert evaluate(model, test)["loss"] == history[-1].loss
    zc.save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.pretrained_cfg["architecture"] == "test_resnet__sparse"
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_gradient_of_a_score_is_its_weight_times_the_masks(make_model):
    net = SupermaskConfig(density=0.3, signed=False).wrap(make_model())
    weight = net.fc.weight
    loss = (weight * torch.randn_like(weight)).sum()
    gradient = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    scores, original = net.fc.parametrizations.weight[0].scores, net.fc.parametrizations.weight.original
    assert torch.allclose(torch.autograd.grad(loss, scores)[0], gradient * original * scores.sign())
    assert not original.requires_grad
    assert torch.equal(original, make_model().fc.weight), "unsigned weights stay"
    kept = scores.abs() >= scores.abs().flatten().sort(descending=True).values[round(0.3 * scores.numel()) - 1]
    assert torch.equal(weight != 0, kept)


def test_any_memory_format_has_the_same_scores(make_model):
    nets = [make_model(), make_model().to(memory_format=torch.channels_last)]
    found = []
    for net in nets:
        torch.manual_seed(1)
        found.append(SupermaskConfig(density=0.3).wrap(net).state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    nets[1](torch.randn(2, 1, 16, 16)).sum().backward()
    assert nets[1].conv1[0].parametrizations.weight[0].scores.grad.any()


def test_a_model_whose_scores_cannot_be_made_stays_as_it_was(make_model, monkeypatch):
    model, before, made = make_model(), make_model().state_dict(), []

    def fail(scores, **kwargs):
        made.append(scores)
        if len(made) == 3:
            raise RuntimeError("out of memory")
        return scores

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        SupermaskConfig().wrap(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_resumes_to_the_same_bits(make_model, make_loaders, tmp_path):
    def stop(line):
        raise KeyboardInterrupt

    config = TrainConfig(epochs=2, lr=0.03)
    state = tmp_path / "state.safetensors"
    lines = []
    whole, _ = found_in(make_model(), make_loaders(), config)
    with pytest.raises(KeyboardInterrupt):
        found_in(make_model(), make_loaders(), config, state=state, log=lambda line: (lines.append(line), len(lines) == 2 and stop(line)))
    assert state.exists()
    resumed, _ = found_in(make_model(), make_loaders(), config, state=state)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_bad_input(make_model):
    with pytest.raises(CompressError, match=r"^SupermaskConfig: density"):
        SupermaskConfig(density=1.5)
    with pytest.raises(CompressError, match="supermask"):
        SupermaskConfig().wrap(zc.sparsify(make_model(), density=0.5))


@pytest.mark.parametrize("signed", [True, False])
def test_a_layer_that_begins_with_zeros_is_drawn(make_model, make_loaders, signed):
    model = make_model()
    with torch.no_grad():
        model.fc.weight.zero_()
    magnitude = math.sqrt(2 / model.fc.in_features)
    torch.manual_seed(1)
    method = SupermaskConfig(signed=signed)
    net = method.wrap(model)
    drawn = net.fc.parametrizations.weight.original
    assert drawn.std().item() == pytest.approx(magnitude, rel=0.1)
    before = [parameter.detach().clone() for parameter in net.parameters() if parameter.requires_grad]
    fit(net, *make_loaders(), CONFIG, method=method)
    assert not any(torch.equal(a, b) for a, b in zip(before, [p for p in net.parameters() if p.requires_grad], strict=True))

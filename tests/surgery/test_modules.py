"""What every public function does about what is around a model: wrappers of torch's, and modes of torch's."""

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CALLS = {
    "analyze": zc.analyze,
    "prune": lambda m: zc.prune(m, macs=0.6),
    "resize": lambda m: zc.resize(m, zc.analyze(m), {}),
    "verify": lambda m: zc.verify(m, zc.analyze(m)),
    "sparsify": lambda m: zc.sparsify(m, density=0.5),
    "cluster": lambda m: zc.cluster(m, bits=2),
    "quantize": lambda m: zc.quantize(m),
    "factorize": lambda m: zc.factorize(m, macs=0.8),
    "plan_factorize": lambda m: zc.plan_factorize(m, macs=0.8),
    "separate": lambda m: zc.separate(m, macs=0.8),
    "plan_separate": lambda m: zc.plan_separate(m, macs=0.8),
    "reinitialize": zc.reinitialize,
    "residual_blocks": zc.residual_blocks,
    "remove_blocks": lambda m: zc.remove_blocks(m, []),
    "calibrate": lambda m: zc.calibrate(m, [IMAGES]),
    "measure": lambda m: zc.measure(m, runs=1, warmup=1),
    "slim": lambda m: zc.slim(m, widths=(0.5, 1.0)),
    "netaug": zc.netaug,
    "add_exits": lambda m: zc.add_exits(m, 1),
    "search": lambda m: zc.search(m, macs=0.5, data=[IMAGES]),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10).eval()


@pytest.mark.parametrize("name", [*CALLS, "save"])
def test_wrappers_that_distribute_are_refused_with_the_way_out(name, model, tmp_path):
    call = CALLS.get(name, lambda m: zc.save(m, tmp_path / "out"))
    with pytest.raises(zc.CompressError, match=r"found DataParallel around it: pass model\.module") as error:
        call(nn.DataParallel(model))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", ["prune", "sparsify", "cluster", "quantize", "factorize", "reinitialize", "add_exits", "slim", "netaug"])
def test_what_is_made_within_any_mode_can_be_trained(name, mode, model):
    with mode():
        made = CALLS[name](model)
    made.train()
    output = made(IMAGES)
    (output[0] if isinstance(output, (list, tuple)) else output).sum().backward()
    assert any(p.grad is not None for p in made.parameters())
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_looking_at_a_model_works_within_any_mode(mode, model, tmp_path):
    expected = str(zc.analyze(model))
    with mode():
        layout = zc.analyze(model)
        assert str(layout) == expected
        zc.verify(model, layout)
        zc.residual_blocks(model)
        zc.measure(model, runs=1, warmup=1)
        zc.calibrate(model, [IMAGES])
        zc.save(model, tmp_path / "out")
        small = zc.prune(model, macs=0.6, reconstruct=[IMAGES], criterion="thinet")
    small.train()(IMAGES).sum().backward()


def test_a_model_made_within_inference_mode_can_be_pruned_and_trained():
    with torch.inference_mode():
        small = zc.prune(timm.create_model("test_resnet", num_classes=10), macs=0.6)
    small.train()(IMAGES).sum().backward()


@pytest.mark.parametrize("call", [CALLS["calibrate"], lambda m: zc.prune(m, macs=0.6, reconstruct=[IMAGES])])
def test_statistics_made_within_inference_mode_cannot_be_changed_and_that_is_said(call):
    with torch.inference_mode():
        model = timm.create_model("test_resnet", num_classes=10)
    with pytest.raises(zc.CompressError, match=r"inference_mode.*outside"):
        call(model)

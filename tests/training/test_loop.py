"""The loop learns, distils, and resumes to the same bits."""

import copy
import math

import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.blocks import BlocksConfig
from zoo_compress.methods.exits import ExitsConfig
from zoo_compress.training.config import AugmentConfig, DistillConfig, FinetuneConfig, TrainConfig
from zoo_compress.training.loop import Phase, evaluate, fit, reseed


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def numbers(history):
    return [(e.train_loss, e.lr, e.loss, e.top1, e.top5) for e in history]


def test_learns_real_digits(make_model, make_loaders, digits):
    model = make_model()
    train, test = make_loaders(digits)
    history = fit(model, train, test, TrainConfig(epochs=4, lr=3e-3))
    assert [e.train_loss for e in history] == sorted((e.train_loss for e in history), reverse=True)
    assert history[-1].top1 > 85
    assert evaluate(model, test) == {"loss": history[-1].loss, "top1": history[-1].top1, "top5": history[-1].top5}


CONFIGS = {
    "adamw, average of weights, warm-up": TrainConfig(epochs=3, lr=3e-3, ema_decay=0.9, warmup_epochs=1, clip_grad=1.0),
    "sgd, step schedule": TrainConfig(epochs=3, opt="sgd", lr=0.05, sched="step", decay_epochs=1, opt_args={"nesterov": True}),
    "mixing": TrainConfig(epochs=3, lr=3e-3, mixup=0.2, cutmix=1.0, smoothing=0.1),
    "channels last": TrainConfig(epochs=3, lr=3e-3, channels_last=True, ema_decay=0.9),
    "distillation": FinetuneConfig(epochs=3, lr=1e-3, distill=DistillConfig(temperature=2.0), smoothing=0.1),
    "features": FinetuneConfig(epochs=3, lr=1e-3, distill=DistillConfig(match="features"), ema_decay=0.9),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("stop_in", [1, 3])
def test_resumes_to_the_same_bits(tmp_path, make_model, make_loaders, config, stop_in):
    phase, teacher = Phase("phase", 2, seed=7, run="this"), make_model(seed=1)
    whole = make_model()
    history = fit(whole, *make_loaders(), config, phase=phase, teacher=teacher)

    stopped, lines = make_model(), []

    def stop(line):
        lines.append(line)
        if len(lines) == stop_in:
            raise KeyboardInterrupt

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, *make_loaders(), config, phase=phase, teacher=teacher, state=state, log=stop)
    torch.manual_seed(99)  # what another process would not share
    resumed, again = make_model(), []
    resumed_history = fit(resumed, *make_loaders(), config, phase=phase, teacher=teacher, state=state, log=again.append)
    assert len(again) == config.epochs - stop_in + 1, "a stop loses one epoch at most"
    assert numbers(resumed_history) == numbers(history)
    assert same_weights(resumed, whole)


def test_channels_last_is_a_matter_of_rounding(make_model, make_loaders):
    losses = {}
    for last in (False, True):
        model, formats = make_model(), []
        model.conv1.register_forward_hook(
            lambda module, args, output, formats=formats: formats.append(output.is_contiguous(memory_format=torch.channels_last))
        )
        losses[last] = [e.train_loss for e in fit(model, *make_loaders(), TrainConfig(epochs=2, opt="sgd", lr=0.01, channels_last=last))]
        assert any(formats) == last
        assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_mixing_gives_the_criterion_mixed_images_and_labels(make_model, make_loaders):
    model, seen = make_model(), []
    train, test = make_loaders(augment=AugmentConfig(no_aug=True))
    real = {image.numpy().tobytes() for images, _ in train for image in images}
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]) if module.training else None)
    history = fit(model, train, test, TrainConfig(epochs=1, lr=1e-6, mixup=1.0))
    mixed = [image.numpy().tobytes() not in real for images in seen for image in images]
    assert sum(mixed) > len(mixed) / 2
    assert history[0].train_loss > 0.9 * math.log(10)
    odd, _ = make_loaders(batch_size=31)
    with pytest.raises(CompressError, match="mixup, cutmix: expected an even number of images in a process's batch, found 31"):
        fit(make_model(), odd, test, TrainConfig(epochs=1, lr=1e-3, cutmix=1.0))


def test_workers_resume_to_the_same_bits(tmp_path, make_model, make_loaders):
    config, options = TrainConfig(epochs=2, lr=1e-3), {"workers": 1, "augment": AugmentConfig(hflip=0.5)}
    whole = make_model()
    fit(whole, *make_loaders(**options), config, state=tmp_path / "whole")

    def stop(line):
        if "2/2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), *make_loaders(**options), config, state=tmp_path / "s", log=stop)
    resumed = make_model()
    fit(resumed, *make_loaders(**options), config, state=tmp_path / "s")
    assert same_weights(resumed, whole)


def test_a_state_of_another_phase_or_run_is_not_resumed(tmp_path, make_model, make_loaders):
    config, state = TrainConfig(epochs=1, lr=1e-3), tmp_path / "state.safetensors"
    fit(make_model(), *make_loaders(), config, phase=Phase(index=1, run="a"), state=state)
    for other in (Phase(index=2, run="a"), Phase(index=1, run="b"), Phase(index=1, run="a", seed=1)):
        lines = []
        fit(make_model(), *make_loaders(), config, phase=other, state=tmp_path / "state.safetensors", log=lines.append)
        assert len(lines) == 1


def test_seeds_differ_between_epochs_phases_and_processes():
    draws = set()
    for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0, 1)]:
        reseed(*key)
        draws.add(torch.rand(()).item())
    assert len(draws) == 5
    assert reseed(3, 1, 2, rank=0) == reseed(3, 1, 2, rank=1), "processes must agree on the order of images"


def test_distillation_pulls_towards_the_teacher(make_model, make_loaders):
    train, test = make_loaders()
    teacher = make_model(seed=1)
    fit(teacher, train, test, TrainConfig(epochs=6, lr=3e-3))
    before = copy.deepcopy(teacher.state_dict())

    def distance(model):
        images = next(iter(test))[0]
        with torch.no_grad():
            return (model.eval()(images).softmax(-1) - teacher.eval()(images).softmax(-1)).abs().mean().item()

    student = make_model()
    start = distance(student)
    fit(student, train, test, FinetuneConfig(epochs=6, lr=3e-3, distill=DistillConfig(task_loss_weight=0.0)), teacher=teacher)
    assert distance(student) < start / 2
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_distillation_needs_a_teacher(make_model, make_loaders):
    with pytest.raises(CompressError, match="teacher"):
        fit(make_model(), *make_loaders(), FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig()))


def test_divergence_is_said(make_model, make_loaders, tmp_path):
    with pytest.raises(CompressError, match=r"finite training loss, found (nan|inf); lower lr"):
        fit(make_model(), *make_loaders(), TrainConfig(epochs=1, opt="sgd", lr=1e30), state=tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("of", ["exits", "blocks", "zeros", "a token"])
def test_a_training_that_fails_lets_go_of_the_model(make_model, make_loaders, of):
    """What it froze is free again, what it hooked on is off: the same model can be trained otherwise."""
    method = {"exits": ExitsConfig(exits=1, train="heads"), "blocks": BlocksConfig()}.get(of)
    model, options = make_model(), {"epochs": 1, "opt": "sgd", "lr": 1e30}
    if of == "zeros":
        model = zc.sparsify(model, density=0.5)
    elif of in ("blocks", "a token"):
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10, "in_chans": 1}
        overlay = {**model.pretrained_cfg, "architecture": "deit_tiny_distilled_patch16_224"}
        model = timm.create_model("deit_tiny_distilled_patch16_224", **sizes, pretrained_cfg_overlay=overlay)
    config = FinetuneConfig(**options, distill=DistillConfig(match="token")) if of == "a token" else TrainConfig(**options)
    net = model if method is None else method.wrap(model)
    hooks = [len(module._forward_hooks) for module in net.modules()]
    with pytest.raises(CompressError, match="finite training loss"):
        fit(net, *make_loaders(), config, teacher=make_model(seed=1), method=method)
    assert all(parameter.requires_grad and not parameter._backward_hooks for parameter in net.parameters())
    assert [len(module._forward_hooks) for module in net.modules()] == hooks
    if of == "a token":
        assert net.train()(torch.randn(2, 1, 16, 16)).shape == (2, 10), "logits again, not those of both tokens"


def test_evaluation_counts_every_image_and_leaves_the_model_alone(make_model, make_loaders, few_digits):
    model = make_model().train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    _, test = make_loaders(eval_batch_size=30)
    before = copy.deepcopy(model.state_dict())
    metrics = evaluate(model, test)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        predicted = torch.cat([model.eval()(images).argmax(1) for images, _ in test]).numpy()
    assert metrics["top1"] == pytest.approx(100 * (predicted == few_digits.test.labels).mean())

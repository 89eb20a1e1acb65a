"""Gradual sparsity: the cubic schedule, removed weights that stay removed, and replacements by gradient."""

from itertools import pairwise

import pytest
import torch
from timm.task import ClassificationTask

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.gradual import GradualConfig, GradualTask
from zoo_compress.surgery.masks import density, masks_of
from zoo_compress.training.config import TrainConfig
from zoo_compress.training.loop import Phase, fit


def trained(net, loaders, method, **options):
    config = TrainConfig(epochs=2, lr=3e-3, weight_decay=0.1, **options.pop("config", {}))
    history = fit(net, *loaders, config, phase=Phase("phase", 2, seed=7, run="this"), method=method, **options)
    return method.finish(net, ()), history


def run(net, config, steps=10):
    """The task after training on the same batch, with the density after each step."""
    task = GradualTask(ClassificationTask(net, verbose=False), config)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    task.start_epoch(0, 1, optimizer, steps)
    images, target = torch.randn(8, *net.pretrained_cfg["input_size"]), torch.arange(8)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        task.train()(images, target)["loss"].backward()
        before = {name: mask.clone() for name, mask in task.masks.items()}
        optimizer.step()
        found.append((before, density(task.masks)))
        assert all(not net.get_parameter(name)[~mask].any() for name, mask in task.masks.items())
    return task, found


def test_density_follows_the_cubic_schedule(make_model):
    task, found = run(make_model(), GradualConfig(density=0.1, start=0.2, end=0.8, every=1))
    first, last = 3, 8
    for step, (before, after) in enumerate(found, 1):
        part = min(1, max(0, (step - first) / (last - first)))
        assert after == pytest.approx(0.1 + 0.9 * (1 - part) ** 3, abs=1e-3)
        assert sum(int(mask.sum()) for mask in before.values()) >= sum(int(mask.sum()) for mask in task.masks.values())


def test_every_so_many_steps_and_at_the_end(make_model):
    _, found = run(make_model(), GradualConfig(density=0.1, end=1.0, every=4))
    densities = [after for _, after in found]
    changes = [step for step, (a, b) in enumerate(zip([1.0, *densities], densities, strict=False), 1) if a != b]
    assert changes == [5, 9, 10], "at the first step the schedule still says all"
    assert densities[-1] == pytest.approx(0.1, abs=1e-3)


def test_a_layer_with_fewer_left_than_its_share_gets_none_back(make_model):
    net = zc.sparsify(make_model(), density=0.5)
    first = masks_of(net)
    task, _ = run(net, GradualConfig(density=0.45, every=1, scope="local"), steps=4)
    for name, mask in task.masks.items():
        assert (mask <= first[name]).all()
        assert int(mask.sum()) == min(int(first[name].sum()), round(0.45 * mask.numel()))


@pytest.mark.parametrize("how", ["gradient", "random"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_replaced_weights_keep_the_density(make_model, how, scope):
    net = zc.sparsify(make_model(), density=0.2, criterion="random")
    config = GradualConfig(density=0.2, every=1, regrow=0.3, regrow_by=how, scope=scope)
    task, found = run(net, config)
    changed = 0
    for (before, after), (later, _) in pairwise(found):
        assert after == pytest.approx(0.2, abs=2e-3)
        changed += sum(int((mask & ~before[name]).sum()) for name, mask in later.items())
    assert changed > 0
    assert task._replaced() == 0 or task.draws > task._bounds[1]


def test_what_grows_has_the_largest_gradients(make_model):
    net = zc.sparsify(make_model(), density=0.2, criterion="random")
    task = GradualTask(ClassificationTask(net, verbose=False), GradualConfig(density=0.2, every=1, regrow=0.3))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    task.start_epoch(0, 1, optimizer, 10)
    before = {name: mask.clone() for name, mask in task.masks.items()}
    task.train()(torch.randn(8, *net.pretrained_cfg["input_size"]), torch.arange(8))["loss"].backward()
    raw = {name: value.clone() for name, value in task.gradients.items()}
    optimizer.step()
    grown = torch.cat([raw[name][mask & ~before[name]].abs() for name, mask in task.masks.items()])
    never = torch.cat([raw[name][~mask & ~before[name]].abs() for name, mask in task.masks.items()])
    assert len(grown) > 100
    assert grown.min() >= never.max()


@pytest.mark.parametrize(("regrow", "average"), [(0.0, None), (0.3, 0.9)], ids=["weights", "average of weights, replacing"])
def test_trains_and_resumes_to_the_same_bits(tmp_path, make_model, make_loaders, regrow, average):
    method = GradualConfig(density=0.2, every=2, regrow=regrow, exclude=("fc.weight",))
    options = {"config": {"ema_decay": average}}
    whole, history = trained(make_model(), make_loaders(), method, **options)
    masks = masks_of(whole)
    assert masks.pop("fc.weight").all()
    assert density(masks) == pytest.approx(0.2, abs=1e-3)
    assert whole.pretrained_cfg["architecture"] == "test_resnet__sparse"
    zc.save(whole, tmp_path / "model")
    assert all(torch.equal(mask, masks_of(zc.load(tmp_path / "model"))[name]) for name, mask in masks.items())

    def stop(line):
        raise KeyboardInterrupt

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(make_model(), make_loaders(), method, state=state, log=stop, **options)
    resumed, again = trained(make_model(), make_loaders(), method, state=state, **options)
    assert [e.train_loss for e in again] == [e.train_loss for e in history]
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True))


def test_more_than_is_left(make_model):
    with pytest.raises(CompressError, match=r"gradual: density: expected at most the 0\.1 that is left"):
        GradualConfig(density=0.5).wrap(zc.sparsify(make_model(), density=0.1))


def test_layers_left_alone_keep_their_zeros(make_model, make_loaders):
    net = zc.sparsify(make_model(), density=0.4, scope="local")
    before = masks_of(net)
    method = GradualConfig(density=0.2, every=2, exclude=("layer4.*", "fc.weight"))
    task = GradualTask(ClassificationTask(net, verbose=False), method)
    assert density(task.masks) == pytest.approx(0.4, abs=1e-2)
    net, _ = trained(net, make_loaders(), method)
    after = masks_of(net)
    assert density({name: mask for name, mask in after.items() if name in task.masks}) == pytest.approx(0.2, abs=1e-3)
    assert all(torch.equal(before[name], after[name]) for name in after if name not in task.masks)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_is_not_taken_does_not_say_what_grows(make_model, to_none):
    net = zc.sparsify(make_model(), density=0.2, criterion="random")
    task = GradualTask(ClassificationTask(net, verbose=False), GradualConfig(density=0.2, every=1, regrow=0.3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    task.start_epoch(0, 1, optimizer, 10)
    images, target = torch.randn(8, *net.pretrained_cfg["input_size"]), torch.arange(8)
    seen = []
    for scale in (torch.inf, 1.0):
        optimizer.zero_grad(set_to_none=to_none)
        torch.manual_seed(0)
        (task.train()(images, target)["loss"] * scale).backward()  # as `GradScaler` finds it, which then calls no `step`
        seen.append({name: value.clone() for name, value in task.gradients.items()})
    assert not any(value.isfinite().all() for value in seen[0].values())
    assert all(value.isfinite().all() for value in seen[1].values())
    optimizer.step()
    assert density(task.masks) == pytest.approx(0.2, abs=1e-3)


def test_gradients_of_several_backward_passes_add_up(make_model):
    net = zc.sparsify(make_model(), density=0.2, criterion="random")
    task = GradualTask(ClassificationTask(net, verbose=False), GradualConfig(density=0.2, every=1, regrow=0.3))
    task.start_epoch(0, 1, torch.optim.SGD(net.parameters(), 0.1), 10)
    images, target = torch.randn(8, *net.pretrained_cfg["input_size"]), torch.arange(8)
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        task.train()(images, target)["loss"].backward()
        seen.append({name: value.clone() for name, value in task.gradients.items()})
    once, twice = seen
    assert all(torch.allclose(twice[name], 2 * once[name], rtol=1e-4, atol=1e-6) for name in once)


def test_a_schedule_without_steps_is_refused(make_model):
    """In a loop of one's own the weights would otherwise all go within the first steps."""
    net = make_model()
    task = GradualTask(ClassificationTask(net, verbose=False), GradualConfig(density=0.2))
    with pytest.raises(CompressError, match=r"gradual: start_epoch: expected steps, .* found none"):
        task.start_epoch(0, 10, torch.optim.SGD(net.parameters(), 0.1))

"""Rewinding: a training that goes on from one of its own steps repeats itself to the bit."""

import pytest
import torch

from zoo_compress.errors import CompressError
from zoo_compress.training.config import TrainConfig
from zoo_compress.training.loop import Phase, fit
from zoo_compress.training.snapshot import Snapshot, Take

CONFIG = TrainConfig(epochs=3, opt="sgd", lr=0.05, ema_decay=0.9, warmup_epochs=1)
PHASE = Phase("phase", 1, seed=3)


def trained(make_model, make_loaders, step, **kwargs):
    model, taken = make_model(), []
    history = fit(model, *make_loaders(), CONFIG, phase=PHASE, snapshot=Take(step, taken.append), **kwargs)
    return model, history, taken[0]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("step", [0, 3, 4, 9])  # four steps an epoch; the model has dropout, the images random crops
def test_going_on_from_a_snapshot_repeats_the_training(tmp_path, make_model, make_loaders, step):
    whole, history, snapshot = trained(make_model, make_loaders, step)
    snapshot.save(tmp_path / "snapshot.safetensors")
    snapshot = Snapshot.load(tmp_path / "snapshot.safetensors")
    assert snapshot.step == step
    again = make_model(seed=5)
    again.load_state_dict(snapshot.model)
    repeated = fit(again, *make_loaders(), CONFIG, phase=PHASE, start=snapshot)
    assert same(again.state_dict(), whole.state_dict())
    assert [(e.lr, e.loss, e.top1) for e in repeated] == [(e.lr, e.loss, e.top1) for e in history[step // 4 :]]


def test_a_snapshot_is_of_its_step(make_model, make_loaders):
    start = make_model().state_dict()
    assert same(trained(make_model, make_loaders, 0)[2].model, start)
    later = trained(make_model, make_loaders, 1)[2]
    assert not same(later.model, start)
    assert trained(make_model, make_loaders, 0)[2].optimizer["state"] == {}
    assert later.optimizer["state"] != {}


def test_stopped_after_a_start_it_goes_on_to_the_same_bits(tmp_path, make_model, make_loaders):
    whole, _, snapshot = trained(make_model, make_loaders, 2)

    lines, state = [], tmp_path / "state.safetensors"

    def stop(line):
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    def go_on(log):
        model = make_model()
        model.load_state_dict(snapshot.model)
        return model, fit(model, *make_loaders(), CONFIG, phase=PHASE, start=snapshot, state=state, log=log)

    with pytest.raises(KeyboardInterrupt):
        go_on(stop)
    again = []
    model, history = go_on(again.append)
    assert len(again) == 2, "the first epoch was saved"
    assert len(history) == 3
    assert same(model.state_dict(), whole.state_dict())


def test_other_weights_take_the_same_images_and_learning_rates(make_model, make_loaders):
    _, history, snapshot = trained(make_model, make_loaders, 6)
    seen = []
    model = make_model(seed=9)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()) if module.training else None)
    other = fit(model, *make_loaders(), CONFIG, phase=PHASE, start=snapshot)
    assert [e.lr for e in other] == [e.lr for e in history[1:]]
    assert len(seen) == 12 - 6


def test_steps_that_do_not_exist_are_refused(tmp_path, make_model, make_loaders):
    _, _, snapshot = trained(make_model, make_loaders, 4)
    with pytest.raises(CompressError, match="snapshot: expected a step below the 12 of this training, found 12"):
        trained(make_model, make_loaders, 12)
    with pytest.raises(CompressError, match="snapshot: expected a step from 4 on, where this training begins, found 2"):
        trained(make_model, make_loaders, 2, start=snapshot)
    with pytest.raises(CompressError, match="start: expected a step below the 4 of this training, found 4"):
        fit(make_model(), *make_loaders(), TrainConfig(epochs=1, lr=0.1), start=snapshot)
    with pytest.raises(CompressError, match="found no such file: that step was never saved"):
        Snapshot.load(tmp_path / "none")

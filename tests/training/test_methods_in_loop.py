"""The loop trains elastic networks as it trains others: it learns, and resumes to the same bits."""

import pytest
import torch

from zoo_compress.errors import CompressError
from zoo_compress.methods.exits import ExitsConfig
from zoo_compress.methods.netaug import NetAugConfig
from zoo_compress.methods.slim import SlimConfig
from zoo_compress.methods.slimming import SlimmingConfig
from zoo_compress.methods.us import UsConfig
from zoo_compress.profiling.settings import ways
from zoo_compress.training.config import TrainConfig
from zoo_compress.training.loop import Phase, evaluate, fit
from zoo_compress.training.task import nested

METHODS = {
    "slim": SlimConfig(widths=(0.5, 1.0)),
    "us": UsConfig(widths=(0.5, 1.0), samples=3),
    "netaug": NetAugConfig(r=2, s=2),
    "slimming": SlimmingConfig(penalty=1e-3),
    "exits": ExitsConfig(exits=1),
    "exits, slim": nested([ExitsConfig(exits=1, distill=0.3), SlimConfig(widths=(0.5, 1.0))]),
    "exits, us": nested([ExitsConfig(exits=1), UsConfig(widths=(0.5, 1.0), samples=2)]),
}


def batches(loader):
    return [images for images, _ in loader][:2]


@pytest.mark.parametrize("average", [None, 0.9], ids=["weights", "average of weights"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_resumes_to_the_same_bits(tmp_path, make_model, make_loaders, method, average):
    config, phase = TrainConfig(epochs=3, lr=3e-3, ema_decay=average), Phase("phase", 2, seed=7, run="this")
    calibration = batches(make_loaders()[1])

    def trained(**options):
        torch.manual_seed(1)
        net = method.wrap(make_model())
        return net, fit(net, *make_loaders(), config, phase=phase, method=method, calibration=calibration, **options)

    whole, history = trained()

    def stop(line):
        raise KeyboardInterrupt

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(state=state, log=stop)
    resumed, again = trained(state=state)
    assert [e.train_loss for e in again] == [e.train_loss for e in history]
    assert [e.top1 for e in again] == [e.top1 for e in history]
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_learns_real_digits_at_every_width(make_model, make_loaders, digits, method):
    train, test = make_loaders(digits)
    calibration = batches(train)
    net = method.wrap(make_model())
    history = fit(net, train, test, TrainConfig(epochs=4, lr=3e-3), method=method, calibration=calibration)
    result = method.finish(net, calibration)
    models = list(ways(result).values())
    assert len(models) == {"netaug": 1, "slimming": 1, "nested": 4}.get(method.kind, 2)
    assert evaluate(models[0], test)["top1"] == history[-1].top1
    assert all(evaluate(model, test)["top1"] > 70 for model in models)


@pytest.mark.parametrize("method", [None, SlimmingConfig()], ids=["none", "slimming"])
@pytest.mark.parametrize(("made_by", "knob"), [("slim", "width"), ("us", "width"), ("exits", "exit"), ("exits, slim", "width")])
def test_a_network_that_runs_in_several_ways_is_not_trained_in_one(make_model, make_loaders, made_by, knob, method):
    net = METHODS[made_by].wrap(make_model())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(CompressError, match=f"expected one that trains every .*{knob}.* of .*, found {'slimming' if method else 'none'}"):
        fit(net, *make_loaders(), TrainConfig(epochs=1, lr=3e-3), method=method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_method_for_one_of_two_knobs_is_refused(make_model, make_loaders):
    net = METHODS["exits, slim"].wrap(make_model())
    with pytest.raises(CompressError, match="trains every exit"):
        fit(net, *make_loaders(), TrainConfig(epochs=1, lr=3e-3), method=METHODS["slim"])

"""Training keeps zeros and shared values to the bit, whatever the optimizer does; centroids learn from summed gradients."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3, unwrap_model
from torch import nn
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.structure.packed import Packing
from zoo_compress.surgery.masks import density, mask_, masks_of
from zoo_compress.surgery.packing import as_integers
from zoo_compress.training.config import TrainConfig
from zoo_compress.training.keep import Keeper
from zoo_compress.training.loop import Phase, fit


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def shared(weight, values):
    with torch.no_grad():
        weight.copy_(torch.tensor(values)[torch.arange(weight.numel()).view(weight.shape) % len(values)])


def steps(net, optimizer, count=5):
    x, y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_stay_zero(net, make):
    optimizer = make(net.parameters())
    steps(net, optimizer)  # momentum of the dense network
    mask = torch.rand(8, 6) < 0.5
    mask_(net[0].weight, mask)
    before = net[0].weight.detach().clone()
    keeper = Keeper(net, {"0.weight": Packing(mask=True)}).attach(optimizer)
    steps(net, optimizer)
    assert (as_integers(net[0].weight)[~mask] == 0).all()
    assert (net[0].weight != before)[mask].all()
    keeper.remove()
    steps(net, optimizer)
    assert not (net[0].weight[~mask] == 0).any()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_values_stay_shared(net, make):
    shared(net[0].weight, [-0.3, -0.1, 0.0, 0.2])
    mask_(net[0].weight, torch.arange(48).view(8, 6) % 4 != 2)
    groups = [(net[0].weight == value).clone() for value in net[0].weight.unique()]
    optimizer = make(net.parameters())
    keeper = Keeper(net, {"0.weight": Packing(mask=True, bits=2)}).attach(optimizer)
    before = net[0].weight.detach().clone()
    steps(net, optimizer)
    for group in groups:
        assert len(as_integers(net[0].weight)[group].unique()) == 1
        assert before[group][0] == 0 or net[0].weight[group][0] != before[group][0]
    assert keeper.masks["0.weight"].sum() == (net[0].weight != 0).sum() == 36


def test_a_centroid_moves_by_the_sum_of_its_gradients(net):
    """Han et al. 2016, equation 3."""
    shared(net[0].weight, [-0.3, 0.1])
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    twin = copy.deepcopy(net)
    F.cross_entropy(twin(x), y).backward()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    Keeper(net, {"0.weight": Packing(bits=1)}).attach(optimizer)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    for value in (-0.3, 0.1):
        group = twin[0].weight == value
        expected = value - 0.1 * twin[0].weight.grad[group].sum()
        assert torch.allclose(net[0].weight[group], expected)


def test_weights_that_are_not_shared_train_freely(net, caplog):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    keeper = Keeper(net, {"0.weight": Packing(bits=2), "absent": Packing(mask=True)}).attach(optimizer)
    assert not keeper.clusters
    assert "0.weight has more than the 4 values of 2 bits" in caplog.text
    steps(net, optimizer)
    assert len(net[0].weight.unique()) == 48


@pytest.mark.parametrize("average", [None, 0.9], ids=["weights", "average of weights"])
def test_the_loop_keeps_them_and_resumes_to_the_same_bits(tmp_path, make_model, make_loaders, average):
    config = TrainConfig(epochs=2, lr=3e-3, opt="sgd", weight_decay=0.1, ema_decay=average, clip_grad=1.0)

    def trained(**options):
        net = zc.sparsify(make_model(), density=0.2)
        masks = masks_of(net)
        return net, masks, fit(net, *make_loaders(), config, phase=Phase("phase", 2, seed=7, run="this"), **options)

    whole, masks, history = trained()
    assert all(torch.equal(mask, masks_of(whole)[name]) for name, mask in masks.items())
    assert density(masks_of(whole)) == pytest.approx(0.2, abs=1e-3)

    def stop(line):
        raise KeyboardInterrupt

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(state=state, log=stop)
    resumed, _, again = trained(state=state)
    assert [e.train_loss for e in again] == [e.train_loss for e in history]
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True))


def test_in_a_loop_of_ones_own(make_model, make_loaders):
    net = zc.sparsify(make_model(), density=0.2)
    masks, optimizer = masks_of(net), torch.optim.AdamW(net.parameters(), weight_decay=1.0)
    keeper = zc.keep_packed(net, optimizer)
    images, target = next(iter(make_loaders()[0]))
    for _ in range(2):
        F.cross_entropy(net(images), target).backward()
        optimizer.step()
    average = copy.deepcopy(net)
    with torch.no_grad():
        average.fc.weight += 1
    keeper.restore_(average)
    for model in (net, average):
        assert all(torch.equal(mask, masks_of(model)[name]) for name, mask in masks.items())


def test_nothing_to_keep(make_model):
    net = make_model()
    with pytest.raises(CompressError, match="keep_packed: expected a model that sparsify, cluster or quantize made"):
        zc.keep_packed(net, torch.optim.SGD(net.parameters()))


def test_a_wrapper_of_another_kind(make_model):
    class Wrapper(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.pretrained_cfg, self._model_args = net, net.pretrained_cfg, net._model_args

    net = Wrapper(zc.sparsify(make_model(), density=0.2))
    with pytest.raises(CompressError, match=r"such as 'conv1\.0\.weight', found Wrapper without; pass the model that it wraps"):
        zc.keep_packed(net, torch.optim.SGD(net.parameters()))


def test_clusters_are_kept_by_the_loop(make_model, make_loaders):
    net = zc.cluster(zc.sparsify(make_model(), density=0.5), bits=3, exclude=["fc.weight"])
    before = {name: net.get_parameter(name).detach().clone() for name in masks_of(net)}
    fit(net, *make_loaders(), TrainConfig(epochs=1, lr=3e-3, weight_decay=0.1, ema_decay=0.9))
    for name, weight in before.items():
        after = net.get_parameter(name)
        if name == "fc.weight":
            assert len(after.unique()) > 100
            continue
        for value in weight.unique():
            members = as_integers(after)[weight == value].unique()
            assert len(members) == 1
            assert value != 0 or members[0] == 0
        assert not torch.equal(after, weight)


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), ModelEmaV3], ids=["compiled", "averaged"])
def test_what_wraps_a_model_has_its_zeros_kept(make_model, make_loaders, wrap):
    net = zc.sparsify(make_model(), density=0.2)
    wrapped = wrap(net)
    inner = unwrap_model(wrapped)
    masks, optimizer = masks_of(net), torch.optim.SGD(inner.parameters(), 0.1, momentum=0.9)
    keeper = zc.keep_packed(wrapped, optimizer)
    images, target = next(iter(make_loaders()[0]))
    for parameter in inner.parameters():
        parameter.requires_grad_(True)
    F.cross_entropy(inner(images), target).backward()
    optimizer.step()
    assert all(torch.equal(mask, masks_of(inner)[name]) for name, mask in masks.items())
    with torch.no_grad():
        inner.fc.weight += 1
    keeper.restore_(wrapped)
    assert torch.equal(masks["fc.weight"], masks_of(inner)["fc.weight"])

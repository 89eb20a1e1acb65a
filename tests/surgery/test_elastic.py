"""A bank runs at many widths as static models of those widths do, and is a plain model otherwise."""

import copy

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.structure.bank import Choice
from zoo_compress.surgery.elastic import Elastic, make_elastic_
from zoo_compress.surgery.verify import flat, random_widths

FORMS = "test_resnet test_efficientnet test_vit test_convnext test_mambaout test_vit_relpos densenet121 levit_128s sequencer2d_s"


def shaken(name, **kwargs):
    """A model whose statistics and one-dimensional parameters differ from element to element."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **kwargs).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.data.uniform_(0.5, 1.5)
    return model


def random_sizes(net, seed):
    import numpy as np

    return {name: len(kept) for name, kept in random_widths(net.layout, np.random.default_rng(seed)).items()}


def elastic(model):
    return make_elastic_(model, zc.analyze(model).settled(), Elastic)


def image(model, batch=2):
    return torch.randn(batch, *model.default_cfg["input_size"])


@pytest.mark.parametrize("name", FORMS.split())
def test_runs_as_the_model_that_resize_makes(name):
    model = shaken(name)
    x = image(model)
    with torch.no_grad():
        whole = flat(model(x))
    plain = copy.deepcopy(model)
    net = elastic(model)
    for seed in (1, 2):
        sizes = random_sizes(net, seed)
        net.set_widths(sizes)
        net.add_choice(Choice(sizes=net.sizes))
        expected = zc.resize(plain, net.layout, sizes)
        with torch.no_grad():
            assert torch.equal(flat(net(x)), flat(expected(x)))
            assert torch.equal(flat(net.static()(x)), flat(expected(x)))
    net.set_widths({})
    with torch.no_grad():
        assert torch.equal(flat(net(x)), whole)


def test_gradients_reach_the_bank_where_the_width_does():
    net = elastic(shaken("test_resnet"))
    net.set_widths(random_sizes(net, 1))
    net.add_choice(Choice(sizes=net.sizes))
    small = net.static()
    x = image(net)
    net(x).square().sum().backward()
    small(x).square().sum().backward()
    for name, parameter in small.named_parameters():
        grad = net.get_parameter(name).grad
        first = grad[tuple(slice(n) for n in parameter.shape)]
        assert torch.equal(first, parameter.grad), name
        assert grad.count_nonzero() == first.count_nonzero(), name  # nothing beyond


def test_at_rest_it_is_the_whole_bank():
    model = shaken("test_resnet")
    names, parameters = list(model.state_dict()), list(model.parameters())
    net = elastic(model)
    net.set_widths(random_sizes(net, 1))
    net.train()(image(net))
    assert list(net.state_dict()) == names
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert isinstance(net, type(shaken("test_resnet")))


def test_statistics_of_one_width_leave_the_others_alone():
    net = elastic(shaken("test_resnet"))
    whole = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.set_widths(random_sizes(net, 1))
    net.train()
    net(image(net))  # forgotten
    net.add_choice(Choice(sizes=net.sizes))
    net(image(net))  # kept
    assert all(torch.equal(buffer, whole[name]) for name, buffer in net.named_buffers() if name in whole)
    tracked = net.get_buffer("private.0.bn1/num_batches_tracked")
    assert tracked == 1
    assert not torch.equal(net.get_buffer("private.0.bn1/running_mean"), whole["bn1.running_mean"][: net.sizes["c0"]])


def test_without_statistics_it_only_trains():
    net = elastic(shaken("test_resnet"))
    net.set_widths(random_sizes(net, 1))
    assert not net.calibrated
    with pytest.raises(zc.CompressError, match="no statistics for the chosen widths: expected zoo_compress"):
        net(image(net))
    with pytest.raises(zc.CompressError, match="calibrate"):
        net.static()
    net.train()(image(net))
    vit = elastic(shaken("test_vit"))  # has no layer that keeps any
    vit.set_widths(random_sizes(vit, 1))
    vit(image(vit))


def test_calibration_finds_what_a_static_model_finds():
    model = shaken("test_resnet")
    plain = copy.deepcopy(model)
    net = elastic(model)
    sizes, batches = random_sizes(net, 3), [image(model, 4) for _ in range(3)]
    zc.calibrate(net, sizes, batches)
    assert net.sizes == net.layout.base_sizes  # as before
    expected = zc.calibrate(zc.resize(plain, net.layout, sizes), batches)
    net.set_widths(sizes)
    with torch.no_grad():
        assert torch.equal(net(batches[0]), expected(batches[0]))
        assert torch.equal(net.static()(batches[0]), expected(batches[0]))


def test_calibration_that_fails_changes_nothing():
    net = elastic(shaken("test_resnet"))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(zc.CompressError, match="data: expected batches of images"):
        zc.calibrate(net, random_sizes(net, 1), [torch.randn(2, 5, 64, 64)])
    assert net.choices == ()
    assert net.sizes == net.layout.base_sizes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_failing_pass_leaves_the_bank_whole():
    net = elastic(shaken("test_resnet")).train()
    shapes = [p.shape for p in net.parameters()]
    net.set_widths(random_sizes(net, 1))
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5, 32, 32))
    assert [p.shape for p in net.parameters()] == shapes
    net(image(net))


def test_a_copy_is_a_network_of_its_own():
    net = elastic(shaken("test_resnet")).train()
    net.set_widths(random_sizes(net, 1))
    net(image(net))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = image(net)
    assert twin.sizes == net.sizes
    assert not twin(x).any()
    assert net(x).any()


def test_every_forward_runs_at_the_width():
    net = elastic(shaken("test_vit"))
    net.set_widths(random_sizes(net, 1))
    features = net.forward_features(image(net))
    assert features.shape[-1] == net.sizes[net.layout.params["norm.weight"][0]]
    assert net.forward_head(features).shape == (2, 7)


def test_recurrent_layers_follow():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = nn.Linear(5, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.rnn(self.embed(x))[0][:, -1])

    model = Reader().eval()
    x = torch.randn(2, 4, 5)
    layout = zc.analyze(model, x).settled()
    plain = copy.deepcopy(model)
    net = make_elastic_(model, layout, Elastic)
    sizes = {name: size // 2 for name, size in layout.base_sizes.items()}
    net.set_widths(sizes)
    with torch.no_grad():
        assert torch.equal(net(x), zc.resize(plain, layout, sizes)(x))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"nowhere": 3}, "not in this layout"),
        ({"c0": 0}, "at least 1"),
        ({"c0": 10_000}, "expected at most"),
        ({"c0": 2.5}, "expected axis → size"),
    ],
)
def test_widths_that_do_not_exist(sizes, message):
    net = elastic(shaken("test_resnet"))
    with pytest.raises(zc.WidthError, match=message):
        net.set_widths(sizes)
    assert net.sizes == net.layout.base_sizes


def test_what_would_run_outside_is_refused():
    net = elastic(shaken("test_vit"))
    with pytest.raises(zc.CompressError, match="gradient checkpointing"):
        net.set_grad_checkpointing()
    with pytest.raises(zc.CompressError, match="several widths already"):
        make_elastic_(net, net.layout, Elastic)
    with pytest.raises(zc.CompressError, match="export"):
        zc.analyze(net)

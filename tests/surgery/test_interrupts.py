"""One elastic network in several threads, and interrupted at any moment; networks with knobs in other processes."""

import copy
import io
import pickle
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import multiprocessing, nn

import zoo_compress as zc
from zoo_compress.methods.slimmable import Slimmable

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def made(name="test_resnet"):
    return timm.create_model(name, num_classes=10)


NETS = {
    "slim": lambda: zc.slim(made(), widths=(0.5, 1.0)),
    "exits": lambda: zc.add_exits(made(), 2),
    "netaug": lambda: zc.netaug(made()),
    "both": lambda: zc.slim(zc.add_exits(made(), 2), widths=(0.5, 1.0)),
}


def outputs(net):
    with torch.no_grad():
        return net.eval()(IMAGES)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_networks_with_knobs_are_pickled_and_copied(make):
    net = make().eval()
    if isinstance(net, Slimmable):
        net.set_width(0.5)
    file = io.BytesIO()
    torch.save(net, file)
    for again in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        assert type(again) is type(net)
        assert torch.equal(outputs(again), outputs(net))
        with torch.no_grad():
            next(iter(again.parameters())).add_(1)
        assert not torch.equal(outputs(again), outputs(net))


def test_a_network_goes_to_a_spawned_process():
    """The network itself is what the worker calls, which has to be made of importable parts alone."""
    net = NETS["both"]().eval().requires_grad_(False)
    net.set_width(0.5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(net, (IMAGES,)).get(timeout=300)
    torch.testing.assert_close(found, outputs(net))


def shapes(net):
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def test_threads_take_turns():
    net = NETS["slim"]().eval()
    net.set_width(0.5)
    expected, before, wrong = outputs(net), shapes(net), []

    def work():
        for _ in range(40):
            try:
                if not torch.equal(outputs(net), expected) or shapes(net) != before:
                    wrong.append("other values")
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Interrupted(BaseException):
    pass


def timed(net):
    start = time.perf_counter()
    outputs(net)
    return time.perf_counter() - start


@contextmanager
def alarms(handler):
    old = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_an_interrupt_at_any_moment_leaves_the_bank_whole():
    net = NETS["slim"]().eval()
    net.set_width(0.5)
    expected, before = outputs(net), shapes(net)

    def interrupt(*_):
        raise Interrupted

    interrupted = 0
    # An interrupt may also hit torch's own `no_grad` while it ends: this one puts the program's gradients back whatever happens within.
    with torch.no_grad(), alarms(interrupt):
        length = min(timed(net) for _ in range(5))
        for i in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, length * (i + 1) / 140)
                outputs(net)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted += 1
            assert shapes(net) == before
            assert all(tensor.shape == before[name] for name, tensor in net.named_parameters())
    assert torch.is_grad_enabled()
    assert interrupted > 20
    assert torch.equal(outputs(net), expected)
    net.set_width(1.0)
    assert outputs(net).shape == (2, 10)


def test_an_interrupt_while_things_are_put_back_is_passed_on_afterwards(monkeypatch):
    from zoo_compress.surgery import elastic

    net = NETS["slim"]().eval()
    net.set_width(0.5)
    before, real, calls = shapes(net), elastic.put, []

    def put(values):
        calls.append(values)
        if len(calls) == 2:  # the first that puts back
            real(values[: len(values) // 2])
            raise Interrupted
        real(values)

    monkeypatch.setattr(elastic, "put", put)
    with pytest.raises(Interrupted):
        outputs(net)
    assert len(calls) == 3
    assert shapes(net) == before


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_slim_that_is_refused_leaves_the_model_alone(name, monkeypatch):
    model = made(name).eval()
    example = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        before = model(example)
    kind, attributes = type(model), set(vars(model))
    monkeypatch.setattr(Slimmable, "stamp", lambda self: (_ for _ in ()).throw(zc.CompressError("no record")))
    with pytest.raises(zc.CompressError, match="no record"):
        zc.slim(model, widths=(0.5, 1.0))
    assert type(model) is kind
    assert set(vars(model)) == attributes
    with torch.no_grad():
        assert torch.equal(model(example), before)


def test_modules_that_run_whatever_they_hold_become_slimmable():
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.Flatten(), nn.Linear(16 * 3600, 5)
    ).eval()
    with torch.no_grad():
        before = layers(IMAGES)
    net = zc.slim(layers, widths=(0.5, 1.0), layout=zc.analyze(layers, IMAGES))
    assert torch.equal(outputs(net), before)
    net.set_width(0.5)
    assert torch.equal(outputs(net), outputs(net.export(0.5)))

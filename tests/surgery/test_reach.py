"""What one pass in eval mode does not reach, or does not give: it follows, or what it may share keeps its width."""

import functools
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn

import zoo_compress as zc

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def pruned(model, example=IMAGES, **budget):
    model = model.eval()
    return zc.prune(model, layout=zc.analyze(model, example), **(budget or {"macs": 0.5}))


class Supervised(nn.Module):
    """Every stage has a head; eval mode gives the last, training all. `through`: the next stage reads what a head gives."""

    def __init__(self, through):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))
        self.heads = nn.ModuleList(nn.Conv2d(32, 17, 1) for _ in range(3))
        self.back = nn.Conv2d(17, 32, 1) if through else None

    def forward(self, x):
        x, outs = self.stem(x).relu(), []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x).relu()
            outs.append(head(x))
            x = x + self.back(outs[-1]) if self.back else x
        return outs if self.training else outs[-1].sum(1)


@pytest.mark.parametrize("through", [False, True])
def test_heads_that_only_training_gives_keep_their_width(through):
    small = pruned(Supervised(through)).train()
    assert [y.shape[1] for y in small(IMAGES)] == [17, 17, 17]
    assert small.stages[0].out_channels < 32


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
        self.head, self.aux = nn.Linear(32, 10), nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x, target=None):
        x = self.a(x).relu()
        y = self.head(self.b(x).relu().mean((2, 3)))
        return (y, self.aux(x.mean((2, 3)))) if self.training else y


def test_branches_of_training_follow_the_width_they_read():
    small = pruned(Auxiliary()).train()
    sum(y.sum() for y in small(IMAGES)).backward()
    assert small.aux[0].in_features == small.a.out_channels < 32
    assert small.aux[2].out_features == 10


class WantsTargets(Supervised):
    def forward(self, x, target=None):
        if self.training and target is None:
            raise ValueError("targets are missing")
        return super().forward(x)


def test_where_training_wants_more_than_images_what_is_not_used_keeps_its_width(caplog):
    model = WantsTargets(False).eval()
    with caplog.at_level(logging.WARNING):
        layout = zc.analyze(model, IMAGES)
    assert "targets are missing" in caplog.text
    assert "targets are missing" in layout.untrained
    small = zc.prune(model, macs=0.5, layout=layout).train()
    assert [y.shape[1] for y in small(IMAGES, 1)] == [17, 17, 17]


class Experts(nn.Module):
    """Each image goes to one of several experts."""

    def __init__(self):
        super().__init__()
        self.embed, self.route, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 4), nn.Linear(32, 10)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in range(4))

    def forward(self, x):
        x = self.embed(x).mean((2, 3))
        chosen = self.route(x).argmax(1)
        return self.head(torch.stack([self.experts[int(i)](row) for row, i in zip(x, chosen, strict=True)]))


def test_widths_that_experts_share_stay_where_nothing_chose_some_of_them():
    torch.manual_seed(0)
    model = Experts().eval()
    layout = zc.analyze(model, IMAGES)
    unused = [i for i in range(4) if (layout.axes[layout.params[f"experts.{i}.0.bias"][0]].frozen or "").startswith("not used")]
    assert unused
    assert "may be shared with experts" in layout.axes[layout.params["embed.bias"][0]].frozen
    assert all(axis.frozen for axis in layout.axes.values() if axis.size in (32, 48))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mlp, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 48), nn.Linear(48, 10)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))

    def forward(self, x, mask=None):
        x = self.embed(x).flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], self.token, x)
        return self.head(self.mlp(x).relu().mean(1))


def test_what_a_parameter_that_is_not_used_may_share_keeps_its_width():
    small = pruned(Masked(), macs=0.8)
    assert small(IMAGES, torch.ones(2, 16, dtype=torch.bool)).shape == (2, 10)
    assert small.embed.out_channels == 32
    assert small.mlp.out_features < 48


class Flattened(nn.Module):
    """A head for another image size reads all positions of all channels as one dimension."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.other = nn.Conv2d(3, 28, 3), nn.Conv2d(28, 20, 3), nn.Linear(20, 5), nn.Linear(20 * 36, 5)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        return self.other(x.flatten(1)) if x.shape[-1] == 6 else self.head(x.mean((2, 3)))


def test_another_image_size_runs_after_pruning():
    small = pruned(Flattened(), macs=0.6)
    assert small(IMAGES[..., :10, :10]).shape == (2, 5)


class Averages(nn.Module):
    """A codebook that training moves and replaces."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 10)
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x):
        x = self.a(x).mean((2, 3))
        if self.training:
            self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return self.fc(x)


def test_buffers_that_training_replaces_follow():
    small = pruned(Averages(), keep=0.5).train()
    small(IMAGES).sum().backward()
    assert small.mean.shape == (small.a.out_channels,) != (32,)


def test_the_examples_own_values_are_used():
    """Noise of its shape took another branch, or none."""

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 32, 1), nn.Conv2d(3, 32, 1), nn.Linear(32, 5)

        def forward(self, x):
            return self.fc((self.a if (x > 10).all() else self.b)(x).mean((2, 3)))

    layout = zc.analyze(Looks().eval(), IMAGES.abs() + 11)
    assert layout.axes[layout.params["b.bias"][0]].frozen.startswith("not used")
    assert not layout.axes[layout.params["a.bias"][0]].frozen.startswith("not used")


class Text(nn.Module):
    def __init__(self, looks):
        super().__init__()
        self.looks, self.embed, self.mlp, self.out = looks, nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 7)

    def forward(self, ids):
        x = self.embed(ids) * (0 if self.looks and (ids == 0).all() else 1)
        return self.out(self.mlp(x).relu().mean(1))


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_integers_stay_integers(looks, kind):
    ids = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(0)).to(kind)
    small = pruned(Text(looks), ids)
    assert small(ids).shape == (2, 7)
    assert small.mlp.out_features < 64


def test_a_tensor_of_an_earlier_call_is_named():
    class Remembers(nn.Module):
        v = 0.0

        def forward(self, x):
            self.v = self.v + (x - self.v) / 2
            return self.v.clamp(max=1)

    model = nn.Sequential(nn.Conv2d(3, 32, 3), Remembers(), nn.Conv2d(32, 5, 1)).eval()
    assert zc.analyze(model, IMAGES).free
    with torch.no_grad():
        model(IMAGES)
    layout = zc.analyze(model, IMAGES)
    assert not layout.free
    assert "1.v is a tensor in a plain attribute" in layout.axes[layout.params["0.weight"][0]].frozen


def test_names_of_modules_may_hold_anything_but_dots():
    model = nn.Sequential()
    for name, layer in {"stem-0": nn.Conv2d(3, 32, 3), "a b": nn.ReLU(), "w/x[3]": nn.Conv2d(32, 32, 3, groups=2)}.items():
        model.add_module(name, layer)
    model.add_module("head", nn.Conv2d(32, 10, 1))
    model.eval()
    layout = zc.analyze(model, IMAGES)
    zc.verify(model, layout, IMAGES)
    small = zc.prune(model, macs=0.5, layout=layout)
    assert small(IMAGES).shape == (2, 10, 12, 12)
    assert small.get_submodule("w/x[3]").in_channels == small.get_submodule("stem-0").out_channels < 32


def test_parameters_may_have_no_elements():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.fc, self.registers = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 10), nn.Parameter(torch.zeros(1, 0, 32))

        def forward(self, x):
            x = self.proj(x).flatten(2).transpose(1, 2)
            return self.fc(torch.cat([self.registers.expand(len(x), -1, -1), x], 1).mean(1))

    model = Net().eval()
    layout = zc.analyze(model, IMAGES)
    zc.verify(model, layout, IMAGES)
    assert zc.prune(model, macs=0.5, layout=layout).registers.shape[:2] == (1, 0)


class Dropping(nn.Module):
    """Training skips layers at random, as Python, numpy or torch says; one of them is used in training alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 24), nn.Linear(24, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24)) for _ in range(4))
        self.noise = nn.Linear(24, 24)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            if not (self.training and (random.random() < 0.3 or np.random.rand() < 0.3)):
                x = x + layer(x)
        if self.training and torch.rand(()).item() < 0.5:
            x = self.noise(x)
        return self.head(x)


def test_analysis_draws_no_random_number_of_the_programs_own_and_comes_out_the_same_whatever_was_drawn_before():
    model, layouts = Dropping().eval(), set()
    for seed in range(4):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        expected = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        layouts.add(str(zc.analyze(model, torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))))
        assert torch.equal(torch.get_rng_state(), expected[0])
        assert (np.random.get_state()[1] == expected[1]).all()
        assert random.getstate() == expected[2]
    assert len(layouts) == 1


class Refused(Exception):
    """What a model raises that has errors of its own."""


class Choosy(nn.Module):
    """Runs in eval mode; in training mode as `error` says, or in no other where `stays`. Its `train` gives nothing back."""

    def __init__(self, error=None, stays=False):
        super().__init__()
        self.error, self.stays = error, stays
        self.a, self.b = nn.Linear(8, 24), nn.Linear(24, 3)

    def train(self, mode=True):
        super().train(mode and not self.stays)

    def forward(self, x):
        if self.training and self.error is not None:
            raise self.error("targets are missing")
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("error", [Refused, ZeroDivisionError, StopIteration, OSError])
def test_a_model_may_raise_anything_in_training_mode(error, caplog):
    with caplog.at_level(logging.WARNING):
        layout = zc.analyze(Choosy(error), torch.randn(2, 8))
    assert "targets are missing" in layout.untrained
    assert "targets are missing" in caplog.text
    assert len(layout.free) == 1


def test_a_sample_alone_is_enough_for_training_mode(caplog):
    """A BatchNorm does not take the pooled features of one sample."""
    parts = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 48), nn.BatchNorm1d(48), nn.Linear(48, 5)]
    model = nn.Sequential(*parts).eval()
    layout = zc.analyze(model, IMAGES[:1])
    assert layout.untrained is None
    assert layout.free == zc.analyze(model, IMAGES).free
    assert len(layout.free) == 2
    assert not caplog.records


@pytest.mark.parametrize("stays", [False, True])
def test_train_may_give_nothing_back(stays):
    torch.manual_seed(0)
    model, x = Choosy(stays=stays), torch.randn(8, 8)
    model.eval()
    layout = zc.analyze(model, x)
    zc.verify(model, layout, x)
    for criterion in ("l2", "taylor"):
        small = zc.prune(model, keep=0.5, layout=layout, round_to=1, criterion=criterion, data=[(x, torch.arange(8) % 3)])
        assert small.a.out_features == 12


def test_what_cannot_be_analysed_is_refused_in_one_line():
    failing = Choosy()
    failing.forward = lambda x: (_ for _ in ()).throw(Refused("no images today"))
    failing.eval()
    with pytest.raises(zc.CompressError, match=r"does not run .* Refused: no images today"):
        zc.analyze(failing, torch.randn(2, 8))
    unfinished = Choosy()
    unfinished.file = (line for line in ())
    with pytest.raises(zc.CompressError, match=r"cannot be copied .*'generator'"):
        zc.analyze(unfinished, torch.randn(2, 8))
    with pytest.raises(zc.CompressError, match=r"at least one sample, found a tensor of shape \(0, 8\)"):
        zc.analyze(Choosy(), torch.randn(0, 8))


@functools.lru_cache
def signs(width):
    return torch.ones(width)


def test_a_cache_by_width_that_only_training_asks_is_no_reason_not_to_train():
    class Signed(Choosy):
        def forward(self, x):
            x = self.a(x)
            return self.b(x * signs(x.shape[1]) if self.training else x)

    assert zc.analyze(Signed(), torch.randn(2, 8)).untrained is None

"""Numbers that a model's own code computes from widths: they follow, or the widths stay as they are."""

import functools
import math
import operator
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.structure.unify import Variable
from zoo_compress.surgery.resize import resize
from zoo_compress.surgery.sizes import Computed, Size, heard_by, plain

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """convolution to 32 channels → body → convolution to 5."""

    def __init__(self, body, **attributes):
        super().__init__()
        self.body = body
        self.stem, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 5, 1)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.head(self.body(self, self.stem(x).relu())).mean((2, 3))


def rolled(cut):
    """Shift the first channels along the image, as many as `cut` makes of their number."""
    return lambda self, x: torch.cat([x[:, : cut(x.shape[1])].roll(2, 3), x[:, cut(x.shape[1]) :]], 1)


TABLE = {32: 0.5, 24: 2.0}
CUTS = {
    "int": lambda c: int(c * 0.25),
    "round": lambda c: round(c * 0.3),
    "ceil": lambda c: math.ceil(c / 3),
    "shift": lambda c: c >> 3,
    "floor division": lambda c: c // 5,
    "divmod": lambda c: divmod(c, 3)[1],
    "remainder": lambda c: c % 5,
    "min": lambda c: min(c, 8),
    "max": lambda c: max(3, c - 20),
    "bits": lambda c: c & 12,
    "root": lambda c: math.isqrt(int(c)),
    "numpy": lambda c: int(np.prod((c, 3)) // 8),
    "numpy scalar": lambda c: int(np.int64(2) * c // 16),
    "text": lambda c: len(f"{c}"),
    "abs": lambda c: abs(c - 40),
    "len": lambda c: len(range(int(c))) // 4,
    "quarter": lambda c: c // 4,
    "rest": lambda c: c - 20,
}
SCALES = {
    "power": lambda self, x: x * x.shape[1] ** -0.5,
    "mean": lambda self, x: x.sum(1, keepdim=True) / x.shape[1] + x,
    "root": lambda self, x: x / math.sqrt(x.shape[1]),
    "weight": lambda self, x: F.conv2d(x, self.head.weight.new_ones(()) * torch.eye(32)[:, :, None, None] / self.head.weight.shape[1]),
    "tensor": lambda self, x: x * torch.tensor(x.shape[1]),
    "full": lambda self, x: x + torch.full((x.shape[1], 1, 1), x.shape[1]),
    "attribute": lambda self, x: x.view(x.shape[0], self.wide, -1, x.shape[3]) * self.wide,
    "setting": lambda self, x: x.view(x.shape[0], self.wide, -1, x.shape[3]) * (self.ratio * self.wide),
    "float": lambda self, x: x * float(x.shape[1]),
    "repeated": lambda self, x: x * sum([1] * x.shape[1]),
}
DECISIONS = {
    "at least": lambda self, x: x.relu() if x.shape[1] >= 30 else x.exp(),
    "equals": lambda self, x: x.relu() if x.shape[1] == 32 else x.exp(),
    "among": lambda self, x: x.relu() if x.shape[1] in (32, 64) else x.exp(),
    "even": lambda self, x: x.relu() if x.shape[1] % 32 == 0 else x.exp(),
    "shapes": lambda self, x: x.exp() if x.shape == x[:, :, :1].repeat(1, 2, 1, 1).shape else x.relu(),
    "table": lambda self, x: x * TABLE[x.shape[1]],
    "set": lambda self, x: x.exp() if x.shape[1] in {24, 40} else x.relu(),
    "sort": lambda self, x: x.relu() if sorted([30, x.shape[1]])[0] == 30 else x.exp(),
    "truth": lambda self, x: x.relu() if x.shape[1] - 24 else x.exp(),
    "text": lambda self, x: x * {"w32": 0.5, "w24": 2.0}[f"w{x.shape[1]}"],
}


def proven(model):
    """The layout of a model, whose proofs hold: also that a pruned model computes what the model does without the dropped channels."""
    layout = zc.analyze(model, IMAGES)
    zc.verify(model, layout, IMAGES)
    return layout


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_cuts_computed_in_python_stay_or_follow(cut):
    torch.manual_seed(0)
    proven(Net(rolled(cut)).eval())


@pytest.mark.parametrize("body", [*SCALES.values(), *DECISIONS.values()], ids=[*SCALES, *DECISIONS])
def test_scales_and_decisions_keep_the_width(body):
    torch.manual_seed(0)
    layout = proven(Net(body, wide=32, ratio=0.5).eval())
    (term,) = {layout.params["stem.weight"][0]}
    assert all(layout.axes[name].frozen for name in layout.axes if name in term.split())


UNSEEN = {
    "one over": lambda self, x: x * (1.0 / x.shape[1]),
    "cut by a factor first": lambda self, x: torch.cat([x[:, : int(0.25 * x.shape[1])].exp(), x[:, int(0.25 * x.shape[1]) :]], 1),
    "logarithm": lambda self, x: x * math.log2(x.shape[1]),
    "whole root": lambda self, x: x * math.isqrt(x.shape[1]),
    "divisor": lambda self, x: x * math.gcd(x.shape[1], 48),
    "repeats": lambda self, x: functools.reduce(lambda y, _: y * 0.9, range(x.shape[1]), x),
    "entry": lambda self, x: x * [0.1 * i for i in range(40)][x.shape[1]],
    "text": lambda self, x: x * len("%d" % x.shape[1] + "x" * (x.shape[1] // 2)),  # noqa: UP031 - the other ways are seen
    "array": lambda self, x: x * float(np.zeros(x.shape[1]).size),
    "power": lambda self, x: x * 1.01 ** x.shape[1],
    "elements": lambda self, x: x / x.shape.numel(),
}


@pytest.mark.parametrize("body", UNSEEN.values(), ids=UNSEEN)
def test_numbers_computed_out_of_sight_keep_the_width(body):
    layout = proven(Net(body).eval())
    assert all(layout.axes[name].frozen for term in layout.params["stem.weight"][:1] for name in layout.axes if name in term.split())


def test_a_greatest_common_divisor_that_is_the_number_of_groups_keeps_the_width():
    """It is the same for 24 and 8 channels, not for 16."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 10, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(F.group_norm(x, math.gcd(x.shape[1], 32)))

    layout = proven(Grouped().eval())
    assert not layout.free
    assert any("8, which the model's code computes" in str(axis.frozen) for axis in layout.axes.values())


def test_only_the_widths_behind_an_unseen_number_are_kept():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 24, 1)
            self.head = nn.Linear(24, 5)

        def forward(self, x):
            x = self.b(self.a(x).relu()).relu()
            return self.head(self.c(x * (1.0 / x.shape[1])).relu().mean((2, 3)))

    layout = proven(Two().eval())
    assert [layout.axes[layout.params[f"{name}.weight"][0]].frozen is None for name in "abc"] == [True, False, True]


def test_a_model_that_never_does_the_same_twice_is_analysed_too():
    model = Net(lambda self, x: x * next(self.counter)).eval()
    model.counter = Counter()
    assert zc.analyze(model, IMAGES).free


class Counter:
    count = 0

    def __next__(self):
        Counter.count += 1
        return float(Counter.count)


HARMLESS = {
    "above nothing": lambda self, x: x.relu() if x.shape[1] > 0 and x.shape[1] else x.exp(),
    "same": lambda self, x: x.relu() if x.shape[1] == x.relu().shape[1] else x.exp(),
    "never used": lambda self, x: [x, x.shape[1] ** -0.5, x.shape[1] / 3][0],
    "groups": lambda self, x: x.reshape(x.shape[0], 4, x.shape[1] // 4, -1).relu().reshape(x.shape) if x.shape[1] % 4 == 0 else x.exp(),
    "attribute": lambda self, x: x + x.mean((2, 3), keepdim=True).broadcast_to(x.shape[0], self.wide, 6, 6),
    "constant": lambda self, x: x * self.wide * (self.ratio * self.wide),
    "whole quotient": lambda self, x: x.reshape(x.shape[0], 2, math.ceil(x.shape[1] / 2), 6, 6).flatten(1, 2),
}


@pytest.mark.parametrize("body", HARMLESS.values(), ids=HARMLESS)
def test_what_holds_at_any_width_costs_nothing(body):
    assert proven(Net(body, wide=32, ratio=0.5).eval()).free


NUMBERS = {
    "broadcast_to": lambda self, x: x + x.mean((2, 3), keepdim=True).broadcast_to(2, 32, 6, 6),
    "aten": lambda self, x: x + torch.ops.aten.expand(x.mean((2, 3), keepdim=True), [2, 32, 6, 6]),
    "aten view": lambda self, x: torch.ops.aten.view.default(x, [2, 32, -1])[..., None],
    "strides": lambda self, x: x.contiguous().as_strided((x.shape[0], 32, 6, 6), (1152, 36, 6, 1)),
    "attribute to aten": lambda self, x: x + torch.ops.aten.expand(x.mean((2, 3), keepdim=True), [2, self.wide, 6, 6]),
    "memory": lambda self, x: x.as_strided(x.shape, x.stride()),
    "groups of a norm": lambda self, x: torch.native_group_norm(x, None, None, x.shape[0], 32, 36, 4, 1e-5)[0],
    "groups of a convolution": lambda self, x: torch.convolution(
        x, torch.ones(32, 8, 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 4
    ),
    "element": lambda self, x: x + x[:, self.wide - 1].unsqueeze(1),
}


@pytest.mark.parametrize("body", NUMBERS.values(), ids=NUMBERS)
def test_sizes_given_to_functions_without_a_handler(body):
    layout = proven(Net(body, wide=32).eval())
    names = [name for name in layout.params["stem.weight"][0].split() if name in layout.axes]
    assert all(layout.axes[name].frozen for name in names[:1])


def _expanded(x: torch.Tensor, wide: int) -> torch.Tensor:
    return x + x.mean((2, 3), keepdim=True).expand(2, wide, 6, 6)


def _counted(x: torch.Tensor) -> torch.Tensor:
    return x / x.size(1)


SCRIPTED = {"expand": torch.jit.script(_expanded), "size": torch.jit.script(_counted)}


@pytest.mark.parametrize("body", [lambda self, x: SCRIPTED["expand"](x, 32), lambda self, x: SCRIPTED["size"](x)], ids=SCRIPTED)
def test_scripted_functions_freeze_what_they_touch(body):
    layout = zc.analyze(Net(body).eval(), IMAGES)
    assert not layout.free
    assert "TorchScript" in layout.axes[layout.params["stem.weight"][0]].frozen


@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda part: torch.jit.trace(part, torch.randn(2, 16, 8, 8))], ids=["script", "trace"]
)
def test_scripted_parts_keep_their_widths_and_the_rest_is_pruned(compiled):
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
        compiled(nn.Conv2d(16, 16, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()
    layout = zc.analyze(model, IMAGES)
    assert [layout.axes[name].size for name in layout.free] == [32]
    zc.verify(model, layout, IMAGES)
    (name,) = layout.free
    small = resize(model, layout, {name: np.arange(8)})
    assert small(IMAGES).shape == (2, 5)
    assert small[0].weight.shape == (8, 3, 1, 1)


@functools.lru_cache
def half(width):
    return width // 2


def cached(self, x):
    return torch.cat([x[:, : half(x.shape[1])].exp(), x[:, half(x.shape[1]) :]], 1)


@pytest.mark.parametrize("body", [cached, DECISIONS["table"], DECISIONS["set"]])
def test_a_layout_does_not_depend_on_what_a_cache_holds(body):
    model = Net(body).eval()
    half.cache_clear()
    before = str(zc.analyze(model, IMAGES))
    assert str(zc.analyze(model, IMAGES)) == before
    half.cache_clear()
    with torch.no_grad():
        model(IMAGES)
    assert str(zc.analyze(model, IMAGES)) == before


def test_analyses_in_threads_hear_their_own_model_only():
    model = Net(DECISIONS["at least"]).eval()
    other = Net(lambda self, x: x).eval()
    alone = str(zc.analyze(model, IMAGES)), str(zc.analyze(other, IMAGES))
    found = []

    def work():
        found.extend((str(zc.analyze(model, IMAGES)), str(zc.analyze(other, IMAGES))) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {alone}
    assert len(found) == 15


class Heard:
    hashable = True

    def __init__(self):
        self.reasons, self.equals = [], []

    def equal(self, a, b):
        self.equals.append((int(plain(a)), int(plain(b))))

    def combine(self, setting):
        self.reasons.append("setting")

    def keep(self, terms, reason, unless=None):
        self.reasons.append(reason)


BINARY = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.pow, divmod]
BINARY += [operator.lshift, operator.rshift, operator.and_, operator.or_, operator.xor, operator.lt, operator.le, operator.eq, operator.ne]


@pytest.mark.parametrize("other", [3, -2, 2.5, True, 4])
@pytest.mark.parametrize("operation", BINARY, ids=lambda f: f.__name__)
def test_arithmetic_gives_what_it_gives_with_plain_numbers(operation, other):
    """And what is not a plain answer remembers, or has told where it went."""
    axis = Variable(12)
    for a, b in ((Size(12, axis), other), (Size(12, axis) / 5, other), (Size(12, axis) // 5, other), (other, Size(12, axis) // 5)):
        try:
            expected = operation(plain(a), plain(b))
        except (TypeError, ValueError, OverflowError) as error:
            with pytest.raises(type(error)):
                operation(a, b)
            continue
        heard = Heard()
        with heard_by(heard):
            found = operation(a, b)
        assert found == expected
        if type(a) in (float, bool):
            continue  # Python lets these operands compute, and they know of no memory
        remembers = [isinstance(n, (Size, Computed)) for n in (found if isinstance(found, tuple) else (found,))]
        assert all(remembers) or heard.reasons


@pytest.mark.parametrize("function", [round, math.floor, math.ceil, math.trunc, abs, operator.neg, operator.pos])
def test_rounding_remembers(function):
    for number in (Size(12, Variable(12)), Size(12, Variable(12)) / 5, Size(13, Variable(13)) // 5):
        assert function(number) == function(plain(number))
        assert isinstance(function(number), (Size, Computed))


def test_what_torch_compares_is_its_own_business():
    heard = Heard()
    with heard_by(heard):
        torch.broadcast_shapes((2, Size(12, Variable(12))), (1, 1))
    assert not heard.reasons

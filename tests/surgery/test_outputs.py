"""What a model gives keeps its width, wherever the tensors are; only features of timm's own headless models may be fewer."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.surgery.outputs import gives_features, tensors_in

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@dataclass
class Boxes:
    scores: torch.Tensor


class Slotted:
    __slots__ = ("scores",)

    def __init__(self, scores):
        self.scores = scores


class Answer(OrderedDict):
    """A mapping that torch does not know as a container, as model zoos for text have them."""


WRAPS = {
    "dataclass": Boxes,
    "namespace": lambda y: SimpleNamespace(scores=y),
    "slots": Slotted,
    "mapping": lambda y: Answer(scores=y),
    "list of objects": lambda y: [Boxes(y), None, "name", 3],
    "nested": lambda y: {"a": (SimpleNamespace(inner={"b": Slotted(y)}),)},
    "distribution": lambda y: torch.distributions.Categorical(logits=y, validate_args=False),
}


class Net(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.a, self.b, self.head, self.wrap = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 48, 3), nn.Linear(48, 24), wrap

    def forward(self, x):
        return self.wrap(self.head(self.b(self.a(x).relu()).mean((2, 3))))


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_outputs_keep_their_width_wherever_they_are(wrap):
    model = Net(wrap).eval()
    small = zc.prune(model, macs=0.5, layout=zc.analyze(model, IMAGES))
    assert small.head.out_features == 24
    assert small.b.out_channels < 48


def test_tensors_are_found_once():
    tensor = torch.ones(2)
    loop = SimpleNamespace(tensor=tensor)
    loop.again = [loop, tensor]
    assert tensors_in(loop) == [tensor]
    assert tensors_in([nn.Linear(2, 2), torch.float32, "text", None]) == []  # weights of modules are no output


def test_a_model_that_gives_no_tensors_is_refused():
    with pytest.raises(zc.CompressError, match="gives no tensors but str"):
        zc.analyze(Net(lambda y: "cat").eval(), IMAGES)


class Own(torch.Tensor):
    """A subclass without anything of its own."""


REMADE = {
    "subclass": lambda y: y.as_subclass(Own),
    "parameter": lambda y: nn.Parameter(y),
    "deepcopy": lambda y: copy.deepcopy(y.detach()),
    "data": lambda y: y.data,
}
TAKEN_OUT = {
    "list": lambda y: torch.tensor(y.tolist()),
    "numpy": lambda y: torch.from_numpy(y.detach().numpy()),
    "asarray": lambda y: torch.as_tensor(np.asarray(y.detach())),
    "dlpack": lambda y: torch.from_dlpack(y.detach().clone()),
}


class Middle(nn.Module):
    """Something happens to a tensor between two layers."""

    def __init__(self, remake):
        super().__init__()
        self.a, self.b, self.remake = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 1), remake

    def forward(self, x):
        return self.b(self.remake(self.a(x).relu())).mean((2, 3))


@pytest.mark.parametrize("remake", REMADE.values(), ids=REMADE)
def test_another_object_for_the_same_memory_keeps_its_axes(remake):
    model = Middle(remake).eval()
    layout = zc.analyze(model, IMAGES)
    assert layout.params["a.weight"][0] == layout.params["b.weight"][1]
    assert layout.params["a.weight"][0] in layout.free
    zc.verify(model, layout, IMAGES)
    given = Net(remake).eval()
    assert zc.prune(given, macs=0.5, layout=zc.analyze(given, IMAGES)).head.out_features == 24


@pytest.mark.parametrize("remake", TAKEN_OUT.values(), ids=TAKEN_OUT)
def test_what_leaves_torch_is_frozen(remake):
    model = Middle(remake).eval()
    layout = zc.analyze(model, IMAGES)
    assert layout.axes[layout.params["a.weight"][0]].frozen
    zc.verify(model, layout, IMAGES)
    given = Net(remake).eval()
    assert zc.prune(given, macs=0.5, layout=zc.analyze(given, IMAGES)).head.out_features == 24


def test_other_elements_of_the_same_memory_freeze_it():
    model = Middle(lambda y: torch.empty(0).set_(y.untyped_storage(), 0, (2, 32, 30, 30), (1, 2, 64, 1920))).eval()
    layout = zc.analyze(model, IMAGES)
    assert layout.axes[layout.params["a.weight"][0]].frozen


def test_only_timms_own_headless_model_gives_features():
    model = timm.create_model("test_resnet", num_classes=0)
    assert gives_features(model)
    assert gives_features(zc.prune(model, macs=0.5))
    model.fc = nn.Linear(model.num_features, 40)
    assert not gives_features(model)
    assert zc.prune(model, macs=0.5).fc.out_features == 40
    assert not gives_features(timm.create_model("test_resnet", num_classes=10))


@pytest.mark.parametrize("head", [nn.Hardswish(), nn.Softmax(1), nn.Sequential(nn.Flatten(), nn.ReLU())])
def test_a_head_without_parameters_keeps_its_width(head):
    model = timm.create_model("test_resnet", num_classes=0).eval()
    width = model.num_features
    model.fc = head
    assert not gives_features(model)
    assert zc.prune(model, macs=0.5)(torch.randn(2, 3, 160, 160)).shape == (2, width)


def test_a_head_inside_the_pooling_of_a_headless_model_keeps_its_width():
    model = timm.create_model("test_resnet", num_classes=0).eval()
    model.global_pool = nn.Sequential(model.global_pool, nn.Linear(model.num_features, 40))
    assert zc.prune(model, macs=0.5)(torch.randn(2, 3, 160, 160)).shape == (2, 40)


def test_a_number_of_classes_of_ones_own_says_nothing_of_the_output():
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_classes, self.body, self.out = 0, nn.Conv2d(3, 32, 3), nn.Linear(32, 24)

        def forward(self, x):
            return self.out(self.body(x).mean((2, 3)))

    model = Embeds().eval()
    assert zc.prune(model, macs=0.7, layout=zc.analyze(model, IMAGES))(IMAGES).shape == (2, 24)

"""Copies that are averaged: tied, both shrink alike; where nothing is said, a word."""

import copy
import logging

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc

IMAGES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


class Distils(nn.Module):
    """A student and a teacher that averages it; the teacher runs in training only, or never."""

    def __init__(self, body, runs=True):
        super().__init__()
        self.student = body
        self.teacher = copy.deepcopy(body).requires_grad_(False)
        self.runs = runs

    def forward(self, x):
        y = self.student(x)
        return (y, self.teacher(x)) if self.training and self.runs else y

    def average(self):
        with torch.no_grad():
            for mean, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.lerp_(new, 0.1)


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_tied_copies_shrink_alike(name, runs):
    model = Distils(timm.create_model(name, num_classes=10), runs).eval()
    layout = zc.analyze(model, IMAGES, tie=[("student", "teacher")])
    assert {n: layout.params[f"teacher.{n}"] for n, _ in model.student.named_parameters()} == {
        n: layout.params[f"student.{n}"] for n, _ in model.student.named_parameters()
    }
    assert layout.free_share > 0.9
    small = zc.prune(model, macs=0.5, layout=layout)
    small.average()
    assert small.student(IMAGES).shape == small.teacher(IMAGES).shape
    assert sum(p.numel() for p in small.teacher.parameters()) < 0.8 * sum(p.numel() for p in model.teacher.parameters())
    # They hold the same elements of each axis: a teacher with the student's weights is the student.
    small.teacher.load_state_dict(small.student.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(small.teacher(IMAGES), small.student(IMAGES))
    whole = copy.deepcopy(model)
    whole.teacher.load_state_dict(whole.student.state_dict())
    again = zc.prune(whole, macs=0.5, layout=layout)
    assert all(map(torch.equal, again.teacher.parameters(), again.student.parameters()))


def test_copies_of_which_nothing_is_said(caplog):
    model = Distils(timm.create_model("test_resnet", num_classes=10)).eval()
    with caplog.at_level(logging.WARNING):
        zc.analyze(model, IMAGES)
    assert "tie=[('student', 'teacher')]" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        zc.analyze(model, IMAGES, tie=[("student", "teacher")])
        zc.analyze(model.student)
        partly = timm.create_model("test_vit")
        partly.blocks[:2].requires_grad_(False)  # fine-tuning: no copy of the blocks that are trained
        zc.analyze(partly)
    assert "tie=" not in caplog.text


@pytest.mark.parametrize(
    ("tie", "message"),
    [
        ([("student", "head")], "no copies: 'conv1.weight'"),
        ([("student", "nobody")], "no module 'nobody'"),
        ([("student",)], "pairs of module names"),
        ("student", "pairs of module names"),
    ],
)
def test_what_is_no_copy_is_refused(tie, message):
    model = Distils(timm.create_model("test_resnet", num_classes=10)).eval()
    model.head = nn.Linear(3, 3)
    with pytest.raises(zc.CompressError, match=r"^tie: ") as caught:
        zc.analyze(model, IMAGES, tie=tie)
    assert message in str(caught.value) or "no copies" in message


def test_a_layout_that_is_known_is_tied_already():
    model = Distils(timm.create_model("test_resnet", num_classes=10)).eval()
    with pytest.raises(zc.CompressError, match="analyze"):
        zc.prune(model, macs=0.5, layout=zc.analyze(model, IMAGES), tie=[("student", "teacher")])

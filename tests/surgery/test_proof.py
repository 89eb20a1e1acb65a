"""Where rows can leave a batch: small models, each with one way of holding on to it."""

import pytest
import torch
from torch import nn

from zoo_compress.errors import AnalysisError
from zoo_compress.surgery.proof import Trial
from zoo_compress.surgery.rows import Stop, Visitor, run, select, set_taps


class Net(nn.Module):
    """8 × 4 images → 5 classes, through `a`, where rows leave, and `b`."""

    def __init__(self, a=None, b=None):
        super().__init__()
        self.a, self.b, self.head = a or nn.Linear(4, 4), b or nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.b(self.a(x)).mean(1))


class Residual(Net):
    def forward(self, x):
        y = x * 2
        return self.head((self.b(self.a(x)) + y).mean(1))


class OnTheStack(Net):
    def forward(self, x):
        return self.head((self.b(x) + self.a(x)).mean(1))


class Count(Net):
    def forward(self, x):
        batch = x.shape[0]
        return self.head(self.b(self.a(x)).reshape(batch, -1, 4).mean(1))


class Shape(Net):
    def forward(self, x):
        shape = x.shape
        return self.head(self.b(self.a(x)).reshape(shape).mean(1))


class FoldedBySample(Net):
    def forward(self, x):
        y = x.flatten(0, 1) * 2
        x = self.a(x)
        return self.head((self.b(x).flatten(0, 1) + y).unflatten(0, (-1, 8)).mean(1))


class FoldedByPosition(Net):
    def forward(self, x):
        y = x.transpose(0, 1).flatten(0, 1) * 2
        x = self.a(x)
        return self.head((self.b(x).transpose(0, 1).flatten(0, 1) + y).unflatten(0, (8, -1)).mean(0))


class FoldedAndFaint(FoldedByPosition):
    def forward(self, x):
        return super().forward(x) + 1e5


class Blind(Residual):
    def forward(self, x):
        return super().forward(x) * 0 + 1


class Hidden(Net):
    def forward(self, x):
        self.kept = x * 2
        return self.head((self.b(self.a(x)) + self.kept).mean(1))


class InAList(Net):
    def forward(self, x):
        features = [x, x * 2]
        features.append(self.a(x))
        return self.head(self.b(sum(features)).mean(1))


class Tuples(nn.Module):
    def forward(self, x):
        return {"x": (x * 1, 3)}, x.flatten(0, 1)


class GivesTuples(Net):
    def __init__(self):
        super().__init__(a=Tuples())

    def forward(self, x):
        found, flat = self.a(x)
        return self.head(self.b(found["x"][0] + flat.unflatten(0, (-1, 8))).mean(1))


class Keep(Visitor):
    def __init__(self, boundary, stay):
        self.boundary, self.stay = boundary, torch.tensor(stay)

    def at(self, index, output):
        return select(output, self.boundary, self.stay)


IMAGE = torch.empty(2, 8, 4)


@pytest.mark.parametrize("kind", [Net, Residual, Count, Shape, FoldedBySample, InAList, GivesTuples])
@pytest.mark.parametrize("stay", [[0, 2, 3], [4], [1, 0]])
def test_rows_that_stay_get_what_they_get_alone(kind, stay):
    model = kind().eval()
    boundary = Trial(model, IMAGE).prove(["a"]).boundaries[0]
    x = torch.randn(5, 8, 4)
    before = x.clone()
    set_taps(model, ["a"])
    with torch.no_grad():
        found = run(model, Keep(boundary, stay), x.detach())
        expected = run(model, None, x[stay])
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, before)  # the caller's images
    assert run(model, None, x).shape == (5, 5)


@pytest.mark.parametrize("kind", [Residual, Count, Shape, FoldedBySample, InAList])
def test_what_is_alive_is_looked_for_only_where_it_has_to_be(kind):
    assert Trial(Net(), IMAGE).prove(["a"]).boundaries[0].alive == ()
    assert Trial(kind(), IMAGE).prove(["a"]).boundaries[0].alive


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OnTheStack, "fails: RuntimeError"),
        (Hidden, "fails: RuntimeError"),
        (FoldedByPosition, "get other logits"),
        (FoldedAndFaint, "get other logits"),
        (Blind, "do not depend on the image"),
    ],
)
def test_refuses_where_rows_cannot_leave(kind, said):
    with pytest.raises(AnalysisError, match=said):
        Trial(kind(), IMAGE).prove(["a"])


def test_refuses_a_folded_batch():
    class Fold(nn.Module):
        def forward(self, x):
            return x.flatten(0, 1)

    class Unfold(nn.Module):
        def forward(self, x):
            return x.unflatten(0, (-1, 8))

    with pytest.raises(AnalysisError, match="samples are no rows of what it gives"):
        Trial(Net(a=Fold(), b=Unfold()), IMAGE).prove(["a"])


def test_refuses_what_does_not_run_once_in_order():
    net = Net()
    with pytest.raises(AnalysisError, match="not run after"):
        Trial(net, IMAGE).prove(["b", "a"])
    net.unused = nn.Linear(4, 4)
    with pytest.raises(AnalysisError, match="does not run in a forward pass"):
        Trial(net, IMAGE).prove(["unused"])
    net.b = net.a
    with pytest.raises(AnalysisError, match="more than once"):
        Trial(net, IMAGE).prove(["a"])


def test_a_model_that_looks_at_values_runs_on_real_tensors():
    class Looks(Net):
        def forward(self, x):
            if x.sum().item() > 1e9:
                return x
            return super().forward(x)

    assert Trial(Looks(), IMAGE).prove(["a"]).output == (5,)


def test_a_stop_ends_the_pass_and_leaves_no_visitor_behind():
    class Ends(Visitor):
        def at(self, index, output):
            raise Stop

    model = Net()
    set_taps(model, ["a"])
    assert run(model, Ends(), torch.zeros(2, 8, 4)) is None
    assert model(torch.zeros(2, 8, 4)).shape == (2, 5)

"""Where rows can leave a batch: small models, each with one way of holding on to it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zoo_compress.errors import AnalysisError
from zoo_compress.surgery.leaving import Decision, Leaving
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


class Mean(nn.Module):
    """A head: the mean of all positions, five times."""

    def forward(self, x):
        return x.flatten(1).mean(1, keepdim=True).expand(-1, 5)


class Exits(nn.Module):
    """A model, followed by two more layers at which rows leave."""

    def __init__(self, net):
        super().__init__()
        self.net, self.c, self.d, self.head = net, nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return self.head(self.d(self.c(self.net(x))))


PLACES = ["net.a", "c", "d"]


class Seen(Visitor):
    def __init__(self):
        self.outputs = []

    def at(self, index, output):
        self.outputs.append(output.clone() if isinstance(output, torch.Tensor) else output)


class Wanted(Decision):
    """Lets samples leave at the exits it was told; the head's logits say nothing."""

    def __init__(self, exits):
        self.exits = exits

    def asks(self, index):
        return True

    def leave(self, index, logits):
        return self.exits == index

    def keep(self, stay):
        self.exits = self.exits[stay]


class Keep(Visitor):
    def __init__(self, boundary, stay):
        self.boundary, self.stay = boundary, torch.tensor(stay)

    def at(self, index, output):
        return select(output, self.boundary, self.stay)


IMAGE = torch.empty(2, 8, 4)


@pytest.mark.parametrize("kind", [Net, GivesTuples])
@pytest.mark.parametrize("stay", [[0, 2, 3], [4], [1, 0]])
def test_rows_that_stay_get_what_they_get_alone(kind, stay):
    model = kind().eval()
    boundary = Trial(model, IMAGE).prove(["a"]).boundaries[0]
    x = torch.randn(5, 8, 4)
    before = x.clone()
    set_taps(model, ["a"])
    with torch.no_grad():
        found = run(model, Keep(boundary, stay), x)
        expected = run(model, None, x[stay])
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, before)
    assert run(model, None, x).shape == (5, 5)


HOLDS = [Residual, OnTheStack, Count, Shape, FoldedBySample, FoldedByPosition, FoldedAndFaint, Blind, Hidden, InAList]


@pytest.mark.parametrize("kind", HOLDS)
def test_rows_cannot_leave_where_other_tensors_of_the_batch_or_its_size_are_used_later(kind):
    trial = Trial(kind(), IMAGE)
    assert trial.prove(["a"]).boundaries == (None,)
    assert "with fewer rows from there on, the model fails" in trial.stays("a")


@pytest.mark.parametrize("kind", [Net, *HOLDS])
def test_a_sample_gets_the_logits_of_the_first_exit_that_is_sure_of_it(kind):
    """Three exits, of which the first is where rows are held, against each exit's logits of the whole batch."""
    torch.manual_seed(0)
    net = Exits(kind()).eval()
    proof = Trial(net, IMAGE).prove(PLACES)
    assert [boundary is not None for boundary in proof.boundaries] == [kind is Net, True, True]
    set_taps(net, PLACES)
    x = torch.randn(9, 8, 4)
    sure = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 3])
    with torch.no_grad():
        last = run(net, every := Seen(), x)
        heads = nn.ModuleList(Mean() for _ in PLACES)
        expected = [*(heads[i](every.outputs[i]) for i in range(3)), last]
        leaving = Leaving(heads, [SimpleNamespace(leaf=0)] * 3, proof.boundaries, Wanted(sure), x)
        leaving.finish(run(net, leaving, x))
    assert torch.equal(leaving.left, sure)
    torch.testing.assert_close(leaving.logits, torch.stack([expected[exit][i] for i, exit in enumerate(sure)]))


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

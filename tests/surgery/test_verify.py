"""The proofs prove: a layout with one thing wrong does not pass."""

import dataclasses

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc


@pytest.fixture(scope="module")
def resnet():
    model = timm.create_model("test_resnet").eval()
    return model, zc.analyze(model)


def changed(layout, name, dim, term):
    dims = list(layout.params[name])
    dims[dim] = term
    return dataclasses.replace(layout, params={**layout.params, name: tuple(dims)})


def test_every_consumer_must_be_named(resnet):
    """Forgetting that a weight reads an axis: the permutation proof finds the axis."""
    model, layout = resnet
    name = next(n for n, dims in layout.params.items() if n.endswith("conv2.weight"))
    axis = layout.params[name][1]
    with pytest.raises(zc.VerificationError, match=f"permutation proof: permuting axis '{axis}'"):
        zc.verify(model, changed(layout, name, 1, str(layout.axes[axis].size)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_of_half_precision_disproves_nothing(resnet, dtype):
    _, layout = resnet
    half = timm.create_model("test_resnet").to(dtype).eval()
    assert zc.verify(half, layout).permutation_error < 1e-6
    assert {p.dtype for p in half.parameters()} == {dtype}


def test_unrelated_axes_must_not_be_merged(resnet):
    model, layout = resnet
    name = next(n for n, dims in layout.params.items() if n.endswith("conv2.weight"))
    wrong = next(a for a in layout.free if a != layout.params[name][1] and layout.axes[a].size == layout.axes[layout.params[name][1]].size)
    with pytest.raises(zc.VerificationError, match="permutation proof"):
        zc.verify(model, changed(layout, name, 1, wrong))


def test_frozen_axes_must_not_be_freed(resnet):
    model, layout = resnet
    classes = next(a for a, axis in layout.axes.items() if axis.frozen == "model output (class logits)")
    freed = dataclasses.replace(layout, axes={**layout.axes, classes: zc.Axis(layout.axes[classes].size)})
    with pytest.raises(zc.VerificationError, match=f"axis '{classes}'"):
        zc.verify(model, freed)


def test_product_order_matters():
    model = timm.create_model("test_vit").eval()
    layout = zc.analyze(model)
    name = next(n for n, dims in layout.params.items() if n.endswith("attn.qkv.weight"))
    three, heads, width = layout.params[name][0].split()
    assert three == "3"
    with pytest.raises(zc.VerificationError, match="permutation proof"):
        zc.verify(model, changed(layout, name, 0, f"{three} {width} {heads}"))


def test_attributes_must_follow():
    """Without the attribute that says how many heads there are, the resized model does not run, or not as computed."""
    model = timm.create_model("test_vit").eval()
    layout = zc.analyze(model)
    kept = {path: term for path, term in layout.attributes.items() if not path.endswith(("num_heads", "head_dim"))}
    assert len(kept) < len(layout.attributes)
    with pytest.raises(zc.VerificationError, match="resize proof"):
        zc.verify(model, dataclasses.replace(layout, attributes=kept))


def test_macs_must_add_up(resnet):
    model, layout = resnet
    term, count = layout.macs_terms[0]
    with pytest.raises(zc.VerificationError, match="MACs"):
        zc.verify(model, dataclasses.replace(layout, macs_terms=((term, count + 1), *layout.macs_terms[1:])))


def test_layout_of_another_model(resnet):
    _, layout = resnet
    with pytest.raises(zc.VerificationError, match=r"another model|analyze the model again"):
        zc.verify(timm.create_model("test_vit"), layout)


def test_the_model_is_left_alone(resnet):
    model, layout = resnet
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    zc.verify(model, layout)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_zeroing_runs_where_nothing_normalises():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    image = torch.zeros(2, 3, 8, 8)
    assert zc.verify(model, zc.analyze(model, image), image).zeroing_error < 1e-12
    model[1] = nn.GroupNorm(1, 8)
    assert zc.verify(model, zc.analyze(model, image), image).zeroing_error is None


def test_rounding_in_a_deep_network_is_no_wrong_layout():
    """Activations that grow from layer to layer would overflow, or drown the output in rounding."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU()) for _ in range(200)]
    for layer in layers:
        layer[0].weight.data *= 1e4
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    image = torch.randn(2, 3, 8, 8)
    layout = zc.analyze(model, image)
    assert zc.verify(model, layout, image).permutation_error < 1e-9


class Sums(nn.Module):
    """Channels that are summed: by `sum`, or in a product of two activations."""

    def __init__(self, before, how):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 32), nn.Linear(6, 32), nn.Linear(4, 3)
        self.before, self.how = before, how

    def forward(self, x):
        x = x.unflatten(1, (4, 6))
        a, b = self.before(self.a(x)), self.before(self.b(x))
        return self.fc(a.sum(2) + b.sum(2) if self.how == "sum" else (a @ b.transpose(1, 2)).sum(1))


@pytest.mark.parametrize("how", ["sum", "product"])
def test_what_is_summed_stays_in_the_zeroing_proof(how):
    image = torch.randn(2, 24)
    for before, zero in ((torch.relu, True), (lambda x: x * x.sigmoid(), True), (torch.sigmoid, False), (torch.exp, False)):
        model = Sums(before, how).eval()
        layout = zc.analyze(model, image)
        assert layout.free
        assert (layout.normalised == frozenset()) == zero
        assert (zc.verify(model, layout, image).zeroing_error is not None) == zero


def test_the_zeroing_proof_finds_what_sums_to_something_else():
    """A mean over what is left, in a layout that does not know that it is one."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 32)

        def forward(self, x):
            return self.a(x).mean(1, keepdim=True)

    image = torch.randn(2, 6)
    layout = zc.analyze(model := Mean().eval(), image)
    assert zc.verify(model, layout, image).zeroing_error is None
    with pytest.raises(zc.VerificationError, match="zeroing proof"):
        zc.verify(model, dataclasses.replace(layout, normalised=frozenset()), image)


class Divides(nn.Module):
    """Channels over something that is learned for each, and is no number of a weight."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(6, 32), nn.Linear(32, 3), kind
        if kind == "knots":
            self.knots = nn.Parameter(torch.linspace(-1, 1, 5).repeat(32, 1))
        else:
            self.scale = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x):
        x = self.a(x)
        if self.kind == "temperature":
            return self.b(x / self.scale)
        if self.kind == "logarithm":
            return self.b(x * self.scale.log())
        steps = (x[..., None] - self.knots[:, :-1]) / (self.knots[:, 1:] - self.knots[:, :-1])
        return self.b(steps.clamp(0, 1).sum(-1))


@pytest.mark.parametrize("kind", ["temperature", "logarithm", "knots"])
def test_what_divides_is_not_zeroed(kind):
    model, image = Divides(kind).eval(), torch.randn(2, 6)
    assert zc.verify(model, zc.analyze(model, image), image).zeroing_error < 1e-9
    zc.prune(model, keep=0.5, layout=zc.analyze(model, image))


def test_a_model_that_draws_random_numbers():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn_like(x[:, :1])

    model, image = nn.Sequential(nn.Linear(6, 32), Noisy(32, 3)).eval(), torch.randn(2, 6)
    with pytest.raises(zc.VerificationError, match="random"):
        zc.verify(model, zc.analyze(model, image), image)
    with pytest.raises(zc.VerificationError, match=r"random.*check=False"):
        zc.prune(model, keep=0.5, layout=zc.analyze(model, image))


def test_a_model_that_keeps_a_state():
    class Remembers(nn.Linear):
        before = 0.0

        def forward(self, x):
            self.before = self.before / 2 + super().forward(x)
            return self.before

    model, image = nn.Sequential(Remembers(6, 32), nn.Linear(32, 3)).eval(), torch.randn(2, 6)
    with pytest.raises(zc.VerificationError, match="state between calls"):
        zc.verify(model, zc.analyze(model, image), image)


def test_an_output_that_no_weight_changes_proves_nothing():
    class Constant(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * 0

    model, image = Constant(nn.Linear(6, 32), nn.Linear(32, 3)).eval(), torch.randn(2, 6)
    with pytest.raises(zc.VerificationError, match="whatever its weights are"):
        zc.verify(model, zc.analyze(model, image), image)


def test_integers_are_taken_as_they_are():
    model = nn.Sequential(nn.Embedding(9, 32), nn.Flatten(), nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    ids = torch.randint(1, 9, (2, 3))
    layout = zc.analyze(model, ids)
    assert len(zc.verify(model, layout, ids).axes_checked) == 2
    assert zc.prune(model, params=0.5, layout=layout)(ids).shape == (2, 3)


def test_costs_that_depend_on_the_image_are_no_contradiction():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.gate, self.out = nn.Linear(6, 32), nn.Linear(32, 2), nn.Linear(32, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, n), nn.ReLU(), nn.Linear(n, 32)) for n in (64, 16))

        def forward(self, x):
            x = self.stem(x)
            chosen, y = self.gate(x).argmax(1), torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                rows = (chosen == i).nonzero()[:, 0]
                if len(rows):
                    y = y.index_add(0, rows, expert(x[rows]))
            return self.out(x + y)

    torch.manual_seed(0)
    model, image = Routed().eval(), torch.randn(16, 6)
    layout = zc.analyze(model, image)
    zc.verify(model, layout, image)


def test_an_axis_without_movable_elements_is_no_reason_to_fail():
    """Where everything is frozen, there is nothing to bisect."""
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    image = torch.randn(2, 6)
    found = zc.verify(model, zc.analyze(model, image), image)
    assert found.axes_checked == ()
    assert found.permutation_error == 0


class Gives(nn.Module):
    """A small model that gives what `end` makes of its features."""

    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.end = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), end

    def forward(self, x):
        return self.end(self.b(self.a(x).relu()).mean((2, 3)))


SMALL = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_sparse_outputs_are_compared():
    model = Gives(lambda y: y.to_sparse()).eval()
    layout = zc.analyze(model, SMALL)
    assert zc.verify(model, layout, SMALL).permutation_error < 1e-6


def test_a_model_in_torchscript_is_refused_in_one_line():
    model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)).eval())
    with pytest.raises(zc.VerificationError, match="TorchScript"):
        zc.verify(model, zc.analyze(model, SMALL), SMALL)


def test_the_programs_random_numbers_go_on_as_if_nothing_was_verified():
    model = Gives(lambda y: nn.functional.dropout(y, 0.5, training=True)).eval()
    layout = zc.analyze(model, SMALL)
    before = torch.get_rng_state()
    with pytest.raises(zc.VerificationError, match="random"):
        zc.verify(model, layout, SMALL)
    assert torch.equal(torch.get_rng_state(), before)

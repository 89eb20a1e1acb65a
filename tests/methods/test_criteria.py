"""What is ranked is what an axis runs through: the weights as the model uses them, whoever wrote the layer."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.nn.utils import prune as masks

import zoo_compress as zc
from zoo_compress.surgery.layers import dense_layers
from zoo_compress.surgery.uses import other_weights

LABELLED = [(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4))]


def test_plain_models_have_no_other_weights():
    """What is only added (position embeddings, class tokens, biases) is no weight: rankings of ordinary models are those they were."""
    for name in ("test_vit", "test_resnet", "test_convnext", "levit_128s", "swin_tiny_patch4_window7_224"):
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        layout = zc.analyze(model)
        assert other_weights(model, layout) == []


class Rows(nn.Module):
    """A parametrization that holds rows of a weight at zero."""

    def __init__(self, dead, size):
        super().__init__()
        self.register_buffer("mask", torch.ones(size, 1))
        self.mask[:dead] = 0

    def forward(self, weight):
        return weight * self.mask


def by_mask(layer):
    mask = torch.ones_like(layer.weight)
    mask[:16] = 0
    masks.custom_from_mask(layer, "weight", mask)


def by_parametrization(layer):
    parametrize.register_parametrization(layer, "weight", Rows(16, 32))


def by_both(layer):
    layer.weight.data[:8] = 0
    by_parametrization(layer)


@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "fpgm", "taylor", "hessian", "obdc"])
@pytest.mark.parametrize("kill", [by_mask, by_parametrization, by_both])
def test_what_is_masked_goes_first(kill, criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
    model[0].bias.data[:16] = 0
    kill(model[0])
    with torch.no_grad():
        model[2].weight *= 0.01
        model[2].weight[:, 16:] += 0.01
        x = torch.randn(3, 8)
        expected = model(x)
        layout = zc.analyze(model, torch.randn(2, 8))
        zc.verify(model, layout, torch.randn(2, 8))
        small = zc.prune(model, keep=0.5, scope="local", round_to=1, criterion=criterion, layout=layout, data=LABELLED)
        torch.testing.assert_close(small(x), expected)


class Own(nn.Module):
    """A layer of one's own: its weight is `make()` of its parameters and buffers, (inputs, outputs)."""

    def __init__(self, make, **tensors):
        super().__init__()
        self.make = make
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x):
        return x @ self.make(self)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


def plain():
    own = Own(lambda m: m.w * 0.1, w=parameter(8, 32))
    own.w.data[:, :16] = 0
    return own


def transposed():
    own = Own(lambda m: m.w.t(), w=parameter(32, 8))
    own.w.data[:16] = 0
    return own


def integers():
    """Weights in bytes with a scale per row, which kills some."""
    codes = torch.randint(-100, 100, (32, 8), dtype=torch.int8)
    return Own(lambda m: (m.codes.float() * m.scale).t(), codes=codes, scale=(torch.arange(32) >= 16).float()[:, None] / 50)


def adapted():
    """A low-rank term that cancels some rows of the weight."""
    own = Own(lambda m: m.w + m.a @ m.b, w=parameter(8, 32), a=parameter(8, 3), b=parameter(3, 32))
    own.w.data[:, :16] = -(own.a @ own.b).data[:, :16]
    return own


@pytest.mark.parametrize("make", [plain, transposed, integers, adapted])
@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp"])
def test_layers_of_ones_own_are_ranked_by_what_they_multiply_with(make, criterion):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Tanh(), nn.Linear(32, 5)).eval()
    with torch.no_grad():
        model[2].weight[:] = torch.where(torch.arange(32) < 16, 0.011, 0.01)  # by this alone, the living would go
    x = torch.randn(3, 8)
    layout = zc.analyze(model, torch.randn(2, 8))
    exclude = [axis for axis in layout.free if layout.axes[axis].size == 3]
    small = zc.prune(model, keep=0.5, scope="local", round_to=1, criterion=criterion, layout=layout, exclude=exclude)
    assert small[2].in_features == 16
    torch.testing.assert_close(small(x), model(x))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(8, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, x):
        return self.out(self.rnn(x)[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dead_units_of_recurrent_layers_go(kind):
    torch.manual_seed(0)
    model, x = Recurrent(kind).eval(), torch.randn(2, 6, 8)
    with torch.no_grad():
        for p in model.rnn.parameters():
            p.view(-1, 32, *p.shape[1:])[:, 16:] = 0
        model.out.weight[:] = torch.where(torch.arange(32) < 16, 0.1, 0.11)
        small = zc.prune(model, layout=zc.analyze(model, x), keep=0.5, scope="local", round_to=1)
        torch.testing.assert_close(small(x), model(x))


class Experts(nn.Module):
    """Two layers of four experts, each in one tensor (experts, inputs, outputs)."""

    def __init__(self):
        super().__init__()
        self.gate, self.a, self.b = nn.Linear(8, 4), parameter(4, 8, 32), parameter(4, 32, 5)

    def forward(self, x):
        y = torch.einsum("beh,eho->beo", torch.einsum("bi,eih->beh", x, self.a).relu(), self.b)
        return torch.einsum("be,beo->bo", self.gate(x).softmax(-1), y)


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 32), nn.Linear(32, 5)

    def forward(self, x):
        return self.out(F.relu(self.embed((x > 0).long()).mean(1)))


@pytest.mark.parametrize("make", [Experts, Embeds])
def test_experts_and_embeddings_are_weights(make):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 8)
    with torch.no_grad():
        (model.a if make is Experts else model.embed.weight)[..., :16] = 0
        reader = model.b if make is Experts else model.out.weight.t()
        reader *= 0.01
        layout = zc.analyze(model, x)
        exclude = [axis for axis in layout.free if layout.axes[axis].size != 32]
        small = zc.prune(model, layout=layout, keep=0.5, scope="local", round_to=1, exclude=exclude)
        torch.testing.assert_close(small(x), model(x))


WRAPPED = {
    "prune.remove(model.get_submodule('0'), 'weight')": lambda layer: masks.l1_unstructured(layer, "weight", 0.5),
    "remove_weight_norm(model.get_submodule('0'))": weight_norm,
    "remove_spectral_norm(model.get_submodule('0'))": spectral_norm,
    "parametrize.remove_parametrizations(model.get_submodule('0'), 'weight')": parametrizations.weight_norm,
}


@pytest.mark.parametrize("remedy", WRAPPED)
@pytest.mark.parametrize("method", [lambda m: zc.sparsify(m, density=0.5), lambda m: zc.cluster(m, 4)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_methods_on_single_weights_refuse_those_that_are_computed(remedy, method):
    """They were overlooked: a layer kept all its weights, without a word."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    WRAPPED[remedy](model[0])
    model(torch.randn(2, 8))
    with pytest.raises(zc.CompressError) as caught:
        method(model)
    assert remedy in str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("remedy", WRAPPED)
def test_factors_name_what_stands_in_their_way(remedy):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    WRAPPED[remedy](model[0])
    _, left = dense_layers(model, zc.analyze(model, torch.randn(2, 64)), torch.randn(2, 64))
    assert remedy in left["0"]

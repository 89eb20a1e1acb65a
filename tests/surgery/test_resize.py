"""The executor: shapes, attributes, and the elements that stay."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo_compress as zc
from zoo_compress.structure import terms
from zoo_compress.structure.layout import parse


@pytest.fixture(scope="module")
def model():
    return timm.create_model("test_resnet").eval()


@pytest.fixture(scope="module")
def layout(model):
    return zc.analyze(model)


def test_kept_elements_are_the_ones_asked_for(model, layout):
    name, axis = next((n, dims[0]) for n, dims in layout.params.items() if n.endswith("conv1.weight") and dims[0] in layout.free)
    kept = [5, 2, 7]
    small = zc.resize(model, layout, {axis: kept})
    assert torch.equal(small.get_parameter(name), model.get_parameter(name)[kept])


def test_all_indices_are_the_identity(model, layout):
    same = zc.resize(model, layout, {axis: np.arange(layout.axes[axis].size) for axis in layout.free})
    image = torch.randn(2, *model.default_cfg["input_size"])
    assert torch.equal(same(image), model(image))
    assert not any(p.data_ptr() == q.data_ptr() for p, q in zip(same.parameters(), model.parameters(), strict=True))


def test_counts_are_those_of_independent_counters(model, layout):
    widths = {axis: max(1, layout.axes[axis].size // 2) for axis in layout.free}
    small = zc.resize(model, layout, widths)
    image = torch.randn(1, *model.default_cfg["input_size"])
    with FlopCounterMode(display=False) as counter:
        small(image)
    assert counter.get_total_flops() == 2 * layout.macs(widths)
    assert sum(p.numel() for p in small.parameters()) == layout.num_params(widths)


def test_descriptive_attributes_follow(model, layout):
    small = zc.resize(model, layout, {axis: max(1, layout.axes[axis].size // 2) for axis in layout.free})
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    image = torch.randn(2, *model.default_cfg["input_size"])
    features = small.forward_features(image)
    assert small.num_features == features.shape[1] == small.get_classifier().in_features
    taps = small.forward_intermediates(image, intermediates_only=True)
    assert [info["num_chs"] for info in small.feature_info][-len(taps) :] == [tap.shape[1] for tap in taps]
    small.reset_classifier(7)
    assert small(image).shape == (2, 7)


def test_frozen_parameters_training_mode_and_dtype_survive():
    model = timm.create_model("test_resnet").half().train()
    model.conv1 = model.conv1 if hasattr(model, "conv1") else None
    for p in model.parameters():
        p.requires_grad_(False)
    layout = zc.analyze(model)
    small = zc.resize(model, layout, {axis: max(1, layout.axes[axis].size // 2) for axis in layout.free})
    assert small.training
    assert all(not p.requires_grad and p.dtype == torch.half for p in small.parameters())


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 8, bias=False)
            self.inner = nn.Linear(8, 8)
            self.again = self.first
            self.last = nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.inner(self.first(x)) + self.again(x))

    model, example = Tied(), torch.zeros(2, 6)
    layout = zc.analyze(model, example)
    proof = zc.verify(model, layout, example)
    assert proof.axes_checked
    small = zc.resize(model, layout, {axis: 4 for axis in layout.free if layout.axes[axis].size == 8})
    assert small.first is small.again
    assert small(torch.randn(2, 6)).shape == (2, 2)


class Biased(nn.Module):
    """A buffer along the channels that is not saved, and one over positions that is computed from them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.register_buffer("shift", torch.zeros(8), persistent=False)
        self.register_buffer("table", torch.arange(20.0).reshape(5, 4), persistent=False)
        self.mix = nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        return self.last((self.first(x) + self.shift) * self.mix(self.table)[2])


def test_buffers_that_are_not_saved():
    """Which part of such a buffer a resized model keeps only its values tell: they are saved, or the axis stays."""
    model, example = Biased(), torch.zeros(2, 6)
    model.shift.copy_(torch.arange(8.0))
    layout = zc.analyze(model, example)
    (axis,) = layout.params["shift"]
    assert layout.axes[axis].frozen is None
    assert "not saved" in layout.axes[layout.params["mix.weight"][1]].frozen
    small = zc.resize(model, layout, {axis: [1, 5]})
    assert torch.equal(small.state_dict()["shift"], torch.tensor([1.0, 5.0]))
    assert "table" not in small.state_dict()
    assert "shift" not in model.state_dict()


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"nonsense": 3}, "not in this layout"),
        ({"{free}": 0}, "at least 1"),
        ({"{free}": True}, "expected a size or a list"),
        ({"{free}": "many"}, "expected a size or a list"),
        ({"{free}": 1.5}, "expected a size or a list"),
        ({"{free}": [0, 0]}, "distinct"),
        ({"{free}": [0, 10**6]}, "distinct and in 0"),
        ({"{free}": 10**12}, "at most its"),
        ({"{frozen}": 2}, "may not change: model output"),
    ],
)
def test_bad_widths(model, layout, widths, message):
    frozen = next(a for a, axis in layout.axes.items() if axis.frozen == "model output (class logits)")
    widths = {name.format(free=layout.free[0], frozen=frozen): width for name, width in widths.items()}
    with pytest.raises(zc.CompressError, match=message):
        zc.resize(model, layout, widths)


def test_layout_terms_give_the_real_shapes(model, layout):
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tuple(terms.size(parse(dim), layout.base_sizes) for dim in layout.params[name]) == tuple(tensor.shape)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_what_a_model_says_of_its_classifiers_input_follows(name):
    """timm's feature distillation and new heads read it; it stayed as it was where making a new head replaces the number, or the head took
    the old one's place in memory."""
    small = zc.prune(timm.create_model(name, num_classes=10), keep=0.5)
    assert small.head_hidden_size == small.get_classifier().in_features
    small.reset_classifier(3)
    assert small.eval()(torch.randn(1, *small.pretrained_cfg["input_size"])).shape == (1, 3)


@pytest.mark.parametrize("renamed", [False, True])
def test_what_a_model_and_its_part_say_of_features_follows(renamed):
    """The names in a part's `feature_info` begin there, also where the model around it passes the same on; timm reads either. Pruned,
    gemma4_vit said 768 channels of maps with 648, and deepseek_vit 1024 of 1016."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = timm.create_model("test_resnet", num_classes=10)
            info = self.encoder.feature_info
            self.feature_info = [{**entry, "module": f"encoder.{entry['module']}"} for entry in info] if renamed else info

        def forward(self, x):
            return self.encoder(x)

    model, example = Around().eval(), torch.randn(1, 3, 32, 32)
    before = [entry["num_chs"] for entry in model.feature_info]
    layout = zc.analyze(model, example)
    small = zc.resize(model, layout, {axis: max(1, layout.axes[axis].size // 2) for axis in layout.free})
    real = [features.shape[1] for features in small.encoder.forward_intermediates(example, intermediates_only=True)]
    assert all(now < then for now, then in zip(real, before, strict=True))
    for said in (small.feature_info, small.encoder.feature_info):
        assert [entry["num_chs"] for entry in said] == real


def test_what_a_model_kept_of_a_call_that_is_over_is_no_part_of_it():
    """levit keeps attention biases between calls in eval mode, here with the graph of the call, which torch does not copy."""
    torch.manual_seed(0)
    model = timm.create_model("levit_128s", num_classes=10).eval()
    images = torch.randn(1, 3, 224, 224)
    expected = model(images)
    assert expected.requires_grad
    layout = zc.analyze(model)
    widths = {name: axis.size // 2 for name, axis in layout.axes.items() if axis.frozen is None}
    small = zc.resize(model, layout, widths).eval()
    untouched = zc.resize(timm_copy(model), layout, widths).eval()
    assert torch.equal(small(images), untouched(images))
    for changed in (zc.sparsify(model, density=0.5), zc.cluster(model, bits=2), zc.quantize(model, "binary")):
        assert changed(images).isfinite().all()
    assert torch.equal(model(images), expected)
    assert not model.training


def timm_copy(model):
    """A model with the same weights that was never called."""
    other = timm.create_model("levit_128s", num_classes=10)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_the_memory_format_survives(name):
    model = timm.create_model(name, num_classes=10).eval().to(memory_format=torch.channels_last)
    small = zc.prune(model, macs=0.6)
    wide = [p for p in small.parameters() if p.ndim == 4 and p.shape[1] > 1 and p[0, 0].numel() > 1]
    assert wide
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)
    plain = zc.prune(timm.create_model(name, num_classes=10), macs=0.6)
    assert all(p.is_contiguous() for p in plain.parameters())


class _Around(torch.nn.Module):
    """Hands on what its inner model says of itself, computed anew whenever it is asked."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = timm.create_model("test_resnet", num_classes=0), torch.nn.Linear(96, 10)

    def forward(self, x):
        return self.head(self.encoder(x))


class _ByProperty(_Around):
    @property
    def feature_info(self):
        return self.encoder.feature_info


class _ByLookup(_Around):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("encoder"), name)


@pytest.mark.parametrize("kind", [_ByProperty, _ByLookup])
def test_what_an_inner_model_says_of_itself_may_be_handed_on(kind):
    model, image = kind().eval(), torch.randn(2, 3, 64, 64)
    small = zc.prune(model, macs=0.5, layout=zc.analyze(model, image))
    with torch.no_grad():
        assert small(image).shape == (2, 10)
        maps = small.encoder.forward_intermediates(image, intermediates_only=True)
    assert [m.shape[1] for m in maps] == [entry["num_chs"] for entry in small.encoder.feature_info]
    assert [entry["num_chs"] for entry in small.feature_info] == [m.shape[1] for m in maps]

"""Sparse networks: as many weights as asked for, chosen as the papers say, in a model that says what it is."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.saliency import SALIENCIES, TEMPERATURE, saliency
from zoo_compress.surgery.masks import apply_, density, keep_best, masks_of
from zoo_compress.surgery.weights import layer_weights


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])) for _ in range(2)]


class Tiny(nn.Module):
    """Small enough for its Hessian."""

    pretrained_cfg = {"input_size": (2, 3, 3), "architecture": "none"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.fc = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.fc(self.conv(x).tanh().mean((2, 3)))


class Keeping(Tiny):
    """The same, but in eval mode the convolution's weight is worked out once."""

    kept = None

    def forward(self, x):
        if self.kept is None or self.training:
            self.kept = 1 * self.conv.weight
        return self.fc(F.conv2d(x, self.kept, self.conv.bias).tanh().mean((2, 3)))

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)


@pytest.fixture
def tiny():
    torch.manual_seed(5)
    return Tiny().double()


@pytest.fixture
def few():
    return [(torch.randn(5, 2, 3, 3).double(), torch.tensor([0, 1, 2, 1, 0])) for _ in range(2)]


def loss_of(model, data, temperature=1.0):
    names = [name for name, _ in model.named_parameters()]

    def loss(*tensors):
        outputs = [(torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,)), t) for x, t in data]
        return sum(F.cross_entropy(y / temperature, t) for y, t in outputs)

    return names, loss, tuple(p.detach() for p in model.parameters())


class TestCriteria:
    def test_snip_is_weight_times_gradient(self, tiny, few):
        names, loss, tensors = loss_of(tiny, few)
        gradients = torch.autograd.functional.jacobian(loss, tensors)
        found = saliency(tiny, layer_weights(tiny), "snip", few)
        for name, weight, gradient in zip(names, tensors, gradients, strict=True):
            if name in found:
                assert torch.allclose(found[name], (weight * gradient).abs())

    def test_grasp_is_weight_times_hessian_gradient(self, tiny, few):
        names, loss, tensors = loss_of(tiny, few, TEMPERATURE)
        gradient = torch.autograd.functional.jacobian(loss, tensors)
        _, product = torch.autograd.functional.hvp(loss, tensors, gradient)
        found = saliency(tiny, layer_weights(tiny), "grasp", few)
        for name, weight, hg in zip(names, tensors, product, strict=True):
            if name in found:
                assert torch.allclose(found[name], weight * hg, rtol=1e-6, atol=1e-18)

    def test_grasp_of_a_sparse_network_is_about_the_gradient_of_what_is_left(self, tiny, few):
        """The gradient flow of the network that is trained: removed weights are not (section 3)."""
        masks = {"fc.weight": torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) < 0.5}
        apply_(tiny, masks)
        names, loss, tensors = loss_of(tiny, few, TEMPERATURE)
        gradient = [
            g * masks[name] if name in masks else g
            for name, g in zip(names, torch.autograd.functional.jacobian(loss, tensors), strict=True)
        ]
        _, product = torch.autograd.functional.hvp(loss, tensors, tuple(gradient))
        found = saliency(tiny, layer_weights(tiny), "grasp", few, masks=masks)
        for name, weight, hg in zip(names, tensors, product, strict=True):
            if name in found:
                assert torch.allclose(found[name], weight * hg, rtol=1e-6, atol=1e-18)

    def test_grasp_goes_on_with_what_is_left(self, model, data):
        thin = zc.sparsify(model, density=0.5, scope="local")
        masks = masks_of(thin)
        scores = saliency(thin, layer_weights(thin), "grasp", data, masks=masks)
        expected = keep_best(scores, 0.3, within=masks)
        found = masks_of(zc.sparsify(thin, density=0.3, criterion="grasp", data=data))
        assert all(torch.equal(mask, found[name]) for name, mask in expected.items())

    def test_synflow_is_conserved_layer_by_layer(self):
        """Tanaka et al. 2020, theorem 1: in a network of linear layers without biases the scores of each layer sum to the same."""
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5, bias=False), nn.Linear(5, 2, bias=False)
        )
        net.pretrained_cfg = {"input_size": (3, 6, 6)}
        sums = [float(score.sum()) for score in saliency(net, layer_weights(net), "synflow").values()]
        assert sums == pytest.approx([sums[0]] * 3, rel=1e-9)

    def test_obd_is_the_diagonal_fisher(self, tiny, few):
        found = saliency(tiny, layer_weights(tiny), "obd", few)
        total, samples = torch.zeros_like(tiny.fc.weight), 0
        for images, target in few:
            for image, label in zip(images, target, strict=True):
                tiny.zero_grad()
                F.cross_entropy(tiny(image[None]), label[None]).backward()
                total, samples = total + tiny.fc.weight.grad**2, samples + 1
        assert torch.allclose(found["fc.weight"], tiny.fc.weight.detach() ** 2 * total / samples)

    @pytest.mark.parametrize("criterion", ["snip", "grasp", "obd", "gradient"])
    def test_of_a_model_that_keeps_what_it_computed(self, criterion, tiny, few):
        """As levit does with its attention biases: what it keeps has the graph of a pass that is over."""
        keeping = Keeping().double()
        keeping.load_state_dict(tiny.state_dict())
        assert torch.equal(keeping(few[0][0]), tiny(few[0][0]))
        found = saliency(keeping, layer_weights(keeping), criterion, few)
        for name, score in saliency(tiny, layer_weights(tiny), criterion, few).items():
            assert torch.allclose(found[name], score)

    @pytest.mark.parametrize("criterion", ["snip", "grasp", "obd", "gradient", "synflow"])
    def test_heads_of_exits_count(self, criterion, model, data):
        net = zc.add_exits(model, 1)
        name = "exits.0.fc.weight"
        found = saliency(net, {name: net.get_parameter(name)}, criterion, data[:1])[name]
        assert found.ne(0).any(1).all()
        if criterion == "gradient":
            net.train()
            (images, target), head = data[0], net.get_parameter(name)
            F.cross_entropy(net(images)[0], target).backward()
            assert torch.allclose(found, head.grad.abs().double(), atol=1e-6)

    def test_what_has_no_second_derivative(self, few):
        net = nn.Sequential(nn.Flatten(), nn.Linear(18, 3), nn.Hardsigmoid()).double()
        with pytest.raises(CompressError, match=r"^criterion 'grasp': it needs second derivatives, and torch has none"):
            saliency(net, layer_weights(net), "grasp", few)

    @pytest.mark.parametrize("criterion", SALIENCIES)
    def test_the_model_stays_as_it_is(self, criterion, model, data):
        before, mode = copy.deepcopy(model.state_dict()), model.training
        found = saliency(model, layer_weights(model), criterion, data[:1])
        assert all(score.shape == model.get_parameter(name).shape for name, score in found.items())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.training == mode
        assert all(p.grad is None for p in model.parameters())

    def test_synflow_removes_no_layer_in_rounds(self):
        """At few weights, removing all at once takes the largest layers whole; its rounds avoid that (section 4, figure 1)."""
        torch.manual_seed(0)
        sizes = [12, 200, 200, 200, 10]
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair, bias=False), nn.ReLU())]
        net = nn.Sequential(nn.Flatten(), *layers)
        net.pretrained_cfg = {"input_size": (3, 2, 2)}
        for rounds, whole in ((1, False), (100, True)):
            kept = masks_of(zc.sparsify(net, density=0.002, criterion="synflow", rounds=rounds))
            assert all(mask.any() for mask in kept.values()) == whole


class TestSparsify:
    @pytest.mark.parametrize("scope", ["global", "local"])
    @pytest.mark.parametrize("wanted", [0.5, 0.05])
    def test_keeps_the_density_and_the_weights(self, model, wanted, scope):
        small = zc.sparsify(model, density=wanted, scope=scope)
        masks = masks_of(small)
        assert density(masks) == pytest.approx(wanted, abs=1e-3)
        for name, mask in masks.items():
            assert torch.equal(small.get_parameter(name)[mask], model.get_parameter(name)[mask])
            if scope == "local":
                assert model.get_parameter(name)[mask].abs().min() >= model.get_parameter(name)[~mask].abs().max()
        others = small.state_dict().keys() - masks.keys()
        assert all(torch.equal(small.state_dict()[name], model.state_dict()[name]) for name in others)
        assert small.pretrained_cfg["architecture"] == "test_resnet__sparse"

    def test_again_removes_from_what_is_left(self, model):
        once = zc.sparsify(model, density=0.5)
        twice = zc.sparsify(once, density=0.2, criterion="random")
        first, second = masks_of(once), masks_of(twice)
        assert density(second) == pytest.approx(0.2, abs=1e-3)
        assert all((mask <= first[name]).all() for name, mask in second.items())
        with pytest.raises(CompressError, match=r"density: expected less than the 0\.2 that is left"):
            zc.sparsify(twice, density=0.3)

    def test_a_layer_with_fewer_left_than_its_share_keeps_those(self, model):
        once = zc.sparsify(model, density=0.5)
        first, second = masks_of(once), masks_of(zc.sparsify(once, density=0.45, scope="local"))
        for name, mask in second.items():
            assert (mask <= first[name]).all(), "what is removed stays so"
            assert int(mask.sum()) == min(int(first[name].sum()), round(0.45 * mask.numel()))
        assert density(second) < 0.45

    @pytest.mark.parametrize("pattern", ["kernel", "channel"])
    @pytest.mark.parametrize("scope", ["global", "local"])
    def test_units_of_a_sparse_model_count_with_what_is_left_of_them(self, model, pattern, scope):
        """And those of which nothing is left count nothing."""
        once = zc.sparsify(model, density=0.7, pattern=pattern, scope=scope)
        once = zc.sparsify(once, density=0.5, scope=scope, exclude=["fc.weight"] if pattern == "channel" else [])
        again = zc.sparsify(once, density=0.4, pattern=pattern, scope=scope)
        first = masks_of(once, again._model_args["variant"]["packed"])
        second = {name: masks_of(again)[name] for name in first}
        assert 0.39 < density(second) <= 0.4
        for name, mask in second.items():
            units = mask.flatten(1 if pattern == "channel" else 2) if mask.ndim > 2 else mask[..., None]
            whole = first[name].view(units.shape)
            assert torch.equal(units, whole & units.any(-1, keepdim=True)), "whole units go, and nothing comes back"

    def test_layers_without_weights_are_named(self, model, caplog):
        with torch.no_grad():
            (model := copy.deepcopy(model)).get_parameter("layer4.0.conv1.weight").mul_(1e-6)
        zc.sparsify(model, density=0.3)
        assert "no weight is left of layer4.0.conv1.weight; scope='local'" in caplog.text
        caplog.clear()
        zc.sparsify(model, density=0.3, scope="local")
        assert not caplog.text

    def test_excluded_weights_stay(self, model):
        small = zc.sparsify(model, density=0.1, exclude=["fc.weight", "layer4.*"])
        assert torch.equal(small.fc.weight, model.fc.weight)
        assert "fc.weight" not in small._model_args["variant"]["packed"]

    def test_channels_but_no_classes(self, model):
        small = zc.sparsify(model, density=0.5, pattern="channel")
        assert torch.equal(small.fc.weight, model.fc.weight)
        rows = small.layer1[0].conv1.weight.flatten(1)
        assert ((rows == 0).all(1) | (rows != 0).all(1)).all()

    def test_other_models_too(self):
        for name in ("test_vit", "test_convnext", "test_efficientnet"):
            net = timm.create_model(name, num_classes=10)
            assert density(masks_of(zc.sparsify(net, density=0.3))) == pytest.approx(0.3, abs=1e-3)
            assert len(masks_of(zc.sparsify(net, pattern="2:4"))) > 3

    @pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
    def test_data_of_any_model(self, name):
        net = timm.create_model(name, num_classes=10)
        images = torch.randn(4, *net.pretrained_cfg["input_size"])
        for criterion in ("snip", "grasp"):
            small = zc.sparsify(net, density=0.3, criterion=criterion, data=[(images, torch.arange(4))])
            assert density(masks_of(small)) == pytest.approx(0.3, abs=1e-3)

    @pytest.mark.parametrize("criterion", ["snip", "grasp", "obd"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_images_need_not_be_in_the_precision_of_the_model(self, model, data, criterion, dtype):
        net = copy.deepcopy(model).to(dtype)
        small = zc.sparsify(net, density=0.3, criterion=criterion, data=data)
        same = zc.sparsify(net, density=0.3, criterion=criterion, data=[(images.to(dtype), target) for images, target in data])
        assert all(torch.equal(mask, masks_of(same)[name]) for name, mask in masks_of(small).items())

    @pytest.mark.parametrize("criterion", ["snip", "grasp", "obd"])
    @pytest.mark.parametrize(
        ("batch", "found"),
        [
            ((torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1])), "torch.uint8 and torch.int64"),
            ((torch.zeros(2, 3, 32, 32), [0, 1]), "torch.float32 and list"),
        ],
    )
    def test_what_are_no_images_or_no_classes(self, model, criterion, batch, found):
        with pytest.raises(CompressError, match=f"data: expected batches of .*: expected float images and class indices, found {found}"):
            zc.sparsify(model, density=0.3, criterion=criterion, data=[batch])

    def test_reinitialising_keeps_the_mask(self, model):
        small = zc.sparsify(model, density=0.2)
        fresh = zc.reinitialize(small, seed=1)
        assert all(torch.equal(mask, masks_of(small)[name]) for name, mask in masks_of(fresh).items())
        assert not torch.equal(fresh.fc.weight, small.fc.weight)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({}, "density: expected the fraction of weights to keep, above 0 and below 1, found None"),
            ({"density": 0}, "found 0"),
            ({"density": 1.0}, "found 1.0"),
            ({"density": True}, "found True"),
            ({"density": float("nan")}, "found nan"),
            ({"density": "half"}, "found 'half'"),
            ({"density": 0.5, "pattern": "2:4"}, "density: expected none beside pattern '2:4'"),
            ({"density": 0.5, "pattern": "block"}, "pattern: expected kernel, channel or N:M"),
            ({"density": 0.5, "scope": "layer"}, "scope: expected global or local, found 'layer'"),
            ({"density": 0.5, "rounds": 0}, "rounds: expected a positive integer, found 0"),
            ({"density": 0.5, "criterion": "l2"}, "criterion: expected one of magnitude, .* found 'l2'"),
            ({"density": 0.5, "criterion": "snip"}, "criterion 'snip' looks at data: pass data="),
            ({"density": 0.5, "criterion": "snip", "data": []}, "expected at least one batch"),
            ({"density": 0.5, "criterion": "snip", "data": [1, 2]}, "data: expected batches of"),
            ({"density": 0.5, "exclude": ["nothing.*"]}, "exclude: 'nothing.*' matches none"),
        ],
    )
    def test_bad_input(self, model, arguments, said):
        with pytest.raises(CompressError, match=said):
            zc.sparsify(model, **arguments)

    def test_weights_that_are_no_numbers(self):
        net = timm.create_model("test_resnet")
        with torch.no_grad():
            net.fc.weight[0, 0] = float("nan")
        with pytest.raises(CompressError, match=r"'fc\.weight' are not finite"):
            zc.sparsify(net, density=0.5)

    def test_what_would_lose_them(self, model):
        small = zc.sparsify(model, density=0.5)
        for change in (zc.slim, zc.netaug):
            with pytest.raises(CompressError, match="expected a model without removed or shared weights"):
                change(small)
        for bank in (timm.create_model("test_resnet__slim", widths=(0.5, 1.0)), timm.create_model("test_resnet__netaug", r=2, s=2)):
            for change in (partial(zc.sparsify, density=0.5), zc.cluster, zc.quantize):
                with pytest.raises(CompressError, match=f"expected a network of one width, found {type(bank).__name__} of several"):
                    change(bank)


@pytest.mark.parametrize("criterion", ["snip", "obd", "synflow"])
def test_scores_that_say_nothing_are_refused(data, criterion):
    model = timm.create_model("test_resnet", num_classes=4)
    with torch.no_grad():
        model.fc.weight.zero_()
    with pytest.raises(CompressError, match=f"criterion '{criterion}': expected weights that the model's output depends on, found none"):
        zc.sparsify(model, density=0.5, criterion=criterion, rounds=1, data=data)


@pytest.mark.parametrize("criterion", ["snip", "grasp", "obd", "synflow"])
def test_where_gradients_are_off(data, criterion):
    model = timm.create_model("test_resnet", num_classes=4, zero_init_last=False)
    expected = zc.sparsify(model, density=0.5, criterion=criterion, rounds=2, data=data)
    with torch.no_grad():
        found = zc.sparsify(model, density=0.5, criterion=criterion, rounds=2, data=data)
    assert all(torch.equal(mask, masks_of(found)[name]) for name, mask in masks_of(expected).items())


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(8, 6, 2, 2, groups=2), nn.ConvTranspose1d(8, 6, 2, 2, groups=2), nn.ConvTranspose1d(8, 6, 2, 2)]
)
@pytest.mark.parametrize("pattern", ["channel", "kernel", "2:4"])
def test_patterns_are_of_outputs_and_inputs_whatever_a_layer_calls_so(layer, pattern):
    density = {} if pattern == "2:4" else {"density": 0.5}
    thin = zc.sparsify(layer, pattern=pattern, **density)
    with torch.no_grad():
        thin.bias.zero_()
        # What each position of the kernel makes of a single input: (inputs, outputs, positions).
        if isinstance(layer, nn.ConvTranspose1d):
            seen = thin(torch.eye(8).unsqueeze(-1)) != 0
        else:
            seen = torch.stack([thin(torch.eye(8)[:, :, None] * torch.eye(2)[i])[..., 0] for i in range(2)], -1) != 0
    each = 8 // layer.groups
    groups = seen.view(layer.groups, each, layer.groups, -1, 2)
    read = torch.stack([groups[i, :, i] for i in range(layer.groups)])  # (groups, inputs, outputs, positions)
    assert read.sum() == layer.weight.numel() / 2
    if pattern == "2:4":
        assert (read.unflatten(1, (-1, 4)).sum(2) == 2).all()
    else:
        over = (1, 3) if pattern == "channel" else (3,)
        assert torch.equal(read.sum(over) > 0, read.float().mean(over) == 1)

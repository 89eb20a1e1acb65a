"""Budgets are met, the best elements stay, and criteria agree with torch-pruning's own groups."""

import dataclasses
import math

import numpy as np
import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress.errors import BudgetError
from zoo_compress.methods.criteria import CRITERIA, scores
from zoo_compress.structure.budget import Budget, meet
from zoo_compress.structure.widths import groups


def batches(model, count=2, size=4):
    generator = torch.Generator().manual_seed(0)
    shape = model.default_cfg["input_size"]
    return [(torch.randn(size, *shape, generator=generator), torch.randint(10, (size,), generator=generator)) for _ in range(count)]


@pytest.mark.parametrize("budget", ["macs", "params", "keep"])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.85])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_budget_is_met(model, layout, budget, fraction, scope):
    small = zc.prune(model, layout=layout, scope=scope, **{budget: fraction})
    after = zc.analyze(small)
    if budget == "keep":
        free = [axis for group in groups(layout) for axis in group.axes]
        reached = sum(after.axes[a].size for a in free) / sum(layout.axes[a].size for a in free)
    else:
        count = {"macs": "macs", "params": "num_params"}[budget]
        reached = getattr(after, count)() / getattr(layout, count)()
    assert abs(reached - fraction) <= 0.02


@pytest.mark.parametrize("asked", [{"macs": 50}, {"params": 50}, {"macs": 0.001}])
def test_percent_taken_for_a_count_leaves_no_stump(model, layout, asked):
    """Two points of tolerance are many times as much as so little."""
    (kind,) = asked
    with pytest.raises(zc.WidthError, match=rf"cannot keep 0\.\d% of {kind}.*: the least reachable with min_keep=0.1 is 1\.\d%"):
        zc.prune(model, layout=layout, **asked)
    with pytest.raises(zc.WidthError, match="no ranks come near"):
        zc.factorize(model, layout=layout, macs=50)


@pytest.mark.parametrize("budget", ["macs", "params", "keep"])
def test_local_sizes_are_those_of_the_budget_whatever_weights_are_worth(budget):
    model = timm.create_model("resnet18__pruned", keep=0.25)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.mul_(2.0 ** (i % 5))
    layouts = [zc.analyze(zc.prune(model, scope="local", criterion=criterion, **{budget: 0.5})) for criterion in ("l1", "random")]
    first, second = ({name: axis.size for name, axis in layout.axes.items()} for layout in layouts)
    assert first == second
    whole = zc.analyze(model)
    kept = [first[name] / whole.axes[name].size for group in groups(whole) for name in group.axes]
    assert max(kept) - min(kept) <= 0.125, "one step of rounding"


def test_absolute_counts(model, layout):
    half = layout.macs() // 2
    small = zc.prune(model, macs=half, layout=layout)
    assert abs(zc.analyze(small).macs() - half) <= 0.02 * layout.macs()


def test_everything_kept_is_the_same_model(model, layout):
    image = torch.randn(2, *model.default_cfg["input_size"])
    for same in (zc.prune(model, macs=1.0, layout=layout), zc.prune(model, macs=1.0, exclude=["*"], layout=layout)):
        assert torch.equal(same(image), model(image))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_and_prunes(model, layout, criterion):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = zc.prune(model, macs=0.6, criterion=criterion, data=batches(model), layout=layout)
    assert abs(zc.analyze(small).macs() / layout.macs() - 0.6) <= 0.02
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("criterion", [name for name, criterion in CRITERIA.items() if criterion.statistic is not None])
def test_criteria_that_need_data_look_at_exits(model, criterion):
    net = zc.add_exits(model, 1)
    data = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    assert zc.analyze(zc.prune(net, macs=0.6, criterion=criterion, data=data)).macs() < 0.65 * zc.analyze(net).macs()


@pytest.mark.parametrize("criterion", [name for name, criterion in CRITERIA.items() if criterion.statistic is not None])
def test_criteria_that_need_data_say_so(model, layout, criterion):
    with pytest.raises(zc.CompressError, match=f"{criterion}.*pass data="):
        zc.prune(model, macs=0.6, criterion=criterion, layout=layout)
    with pytest.raises(zc.CompressError, match="at least one batch"):
        zc.prune(model, macs=0.6, criterion=criterion, layout=layout, data=[])
    with pytest.raises(zc.CompressError, match="expected batches of"):
        zc.prune(model, macs=0.6, criterion=criterion, layout=layout, data=[1, 2])


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_images_need_not_be_in_the_precision_of_the_model(criterion):
    model = timm.create_model("test_resnet", num_classes=10).bfloat16()
    images, target = torch.randn(4, 3, 64, 64), torch.arange(4)
    small, same = (zc.prune(model, macs=0.7, criterion=criterion, data=[(x, target)]) for x in (images, images.bfloat16()))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "fpgm", "bn_scale", "taylor", "hessian"])
def test_scores_are_torch_prunings(criterion):
    """On a residual network, the groups written from the layout score exactly as those torch-pruning finds itself."""
    import torch_pruning as tp
    from torch_pruning.pruner import importance

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
    layout = zc.analyze(model)
    data = [(torch.randn(1, 3, 32, 32), torch.tensor([3]))]
    for images, target in data:
        torch.nn.functional.cross_entropy(model(images), target).backward()
    if criterion == "hessian":
        for p in model.parameters():
            p.grad = p.grad**2
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.randn(1, 3, 32, 32))
    for path in ("layer1.0.conv1", "layer2.0.conv2", "conv1"):
        conv = model.get_submodule(path)
        group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=list(range(conv.out_channels)))
        chosen = CRITERIA[criterion]
        expected = getattr(importance, chosen.importance)(**chosen.arguments)(group).double().numpy()
        axis = layout.params[f"{path}.weight"][0]
        found = scores(model, layout, [axis], criterion, data)[axis]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_highest_scores_stay(model, layout):
    name, axis = next((n, dims[0]) for n, dims in layout.params.items() if n.endswith("conv1.weight") and dims[0] in layout.free)
    score = scores(model, layout, [axis], "l2")[axis]
    small = zc.prune(model, macs=0.5, layout=layout)
    size = small.get_parameter(name).shape[0]
    assert size < len(score)
    expected = np.sort(np.argsort(-score)[:size])
    bias = name.replace("conv1.weight", "bn1.running_mean")
    assert torch.equal(small.get_buffer(bias), model.get_buffer(bias)[expected])


def test_min_keep_and_rounding(model, layout):
    candidates = groups(layout)
    ranked = scores(model, layout, layout.free, "l2")
    sizes = meet(layout, candidates, ranked, Budget("macs", 0.4, min_keep=0.3, round_to=8))
    for name, size in sizes.items():
        assert size >= math.ceil(0.3 * layout.axes[name].size - 1e-9)
        assert 1 <= size <= layout.axes[name].size


def test_excluded_axes_stay(model, layout):
    name = next(n for n in layout.params if n.endswith("conv1.weight"))
    small = zc.prune(model, macs=0.7, layout=layout, exclude=[name])
    assert small.get_parameter(name).shape == model.get_parameter(name).shape


def test_pruned_models_are_pruned_again(model, layout):
    once = zc.prune(model, macs=0.7, layout=layout)
    twice = zc.prune(once, macs=0.7)
    assert abs(zc.analyze(twice).macs() / layout.macs() - 0.49) < 0.03
    zc.verify(twice, zc.analyze(twice))


def test_a_model_that_would_not_run_is_not_given_out(model, layout):
    """A layout that forgets an attribute: the error comes from `prune`, not from the user's first batch."""
    vit = timm.create_model("test_vit").eval()
    found = zc.analyze(vit)
    kept = {path: term for path, term in found.attributes.items() if not path.endswith(("num_heads", "head_dim"))}
    with pytest.raises(zc.CompressError, match=r"does not run|the pruned model has"):
        zc.prune(vit, macs=0.5, layout=dataclasses.replace(found, attributes=kept))


def test_backbone_gives_fewer_features(tmp_path):
    """Without a classifier the output is features: their number may change, their order may not."""
    model = timm.create_model("test_vit", num_classes=0).eval()
    layout = zc.analyze(model)
    assert zc.verify(model, layout).permutation_error < 1e-9
    small = zc.prune(model, macs=0.5, layout=layout).eval()
    image = torch.randn(2, *model.default_cfg["input_size"])
    with torch.no_grad():
        features = small(image)
        zc.save(small, tmp_path)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert features.shape == (2, small.num_features)
        assert small.num_features < model.num_features
        assert torch.equal(again(image), features)


def test_random_is_reproducible_and_leaves_the_generator_alone(model, layout):
    state = torch.get_rng_state()
    first, second, other = (scores(model, layout, layout.free[:1], "random", seed=seed)[layout.free[0]] for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of keep, macs, params and latency, found none"),
        ({"keep": 0.5, "macs": 0.5}, "exactly one of .* found keep, macs"),
        ({"macs": 0}, "fraction in"),
        ({"macs": -0.5}, "fraction in"),
        ({"macs": float("nan")}, "fraction in"),
        ({"macs": "half"}, "fraction in"),
        ({"macs": True}, "fraction in"),
        ({"params": 10**12}, "more than the model has"),
        ({"macs": 0.5, "criterion": "magic"}, "expected one of l1, l2"),
        ({"macs": 0.5, "scope": "layer"}, "scope is 'global' or 'local'"),
        ({"macs": 0.5, "round_to": 0}, "round_to is a positive integer"),
        ({"macs": 0.5, "min_keep": 0.0}, "min_keep is a fraction"),
        ({"macs": 0.5, "exclude": ["nothing.like.it"]}, "is no axis and matches no parameter"),
        ({"macs": 0.1, "min_keep": 0.5}, "the least reachable with min_keep=0.5 is"),
    ],
)
def test_bad_requests(model, layout, arguments, message):
    with pytest.raises(zc.CompressError, match=message):
        zc.prune(model, layout=layout, **arguments)


def test_criterion_that_ranks_nothing():
    model = timm.create_model("test_vit").eval()
    with pytest.raises(zc.CompressError, match="the criterion ranks no axis"):
        zc.prune(model, macs=0.5, criterion="bn_scale")


def test_not_a_model():
    with pytest.raises(zc.CompressError, match="expected a torch"):
        zc.prune("resnet18", macs=0.5)


def test_what_is_handed_out_is_proven():
    """The resize proof is content with a model whose cut moves among its channels; the zeroing proof is not."""

    class Cut(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 10, 3)

        def forward(self, x):
            x = self.stem(x).relu()
            cut = int(x.shape[1] * 0.25)
            return self.fc(torch.cat([x[:, :cut] * 2, x[:, cut:]], 1)).mean((2, 3))

    class Plain(Cut):
        def forward(self, x):
            return self.fc(self.stem(x).relu()).mean((2, 3))

    torch.manual_seed(0)
    model, image = Cut().eval(), torch.randn(2, 3, 16, 16)
    model.stem.weight.data[:16] *= 0.1  # these go, and with them all that are doubled
    layout = zc.analyze(Plain().eval(), image)  # as if the cut had not been seen
    with pytest.raises(zc.VerificationError, match="zeroing proof"):
        zc.prune(model, macs=0.5, layout=layout)
    assert zc.prune(model, macs=0.5, layout=layout, check=False).stem.out_channels < 32


def test_proofs_leave_the_model_alone():
    class Counts(torch.nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counts(torch.nn.Linear(6, 32), torch.nn.Linear(32, 3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zc.prune(model, keep=0.5, layout=zc.analyze(model, torch.randn(2, 6)))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_error_says_what_froze_the_axes():
    """'The criterion ranks no axis' was all it said, whatever the cause was."""

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = torch.nn.Linear(6, 32), torch.nn.Linear(6, 24), torch.nn.Linear(56, 3)

        def forward(self, x):
            return self.fc(torch.cat([self.a(x) - torch.ones(32), self.b(x) - torch.ones(24)], 1))

    model = Fixed().eval()
    layout = zc.analyze(model, torch.randn(2, 6))
    causes = {axis.frozen for axis in layout.axes.values()}
    assert None not in causes
    with pytest.raises(BudgetError) as caught:
        zc.prune(model, macs=0.5, layout=layout)
    assert all(cause in str(caught.value) for cause in causes)
    free = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Linear(32, 3)).eval()
    with pytest.raises(BudgetError, match="1 may change, and it has no score"):
        zc.prune(free, macs=0.5, layout=zc.analyze(free, torch.randn(2, 6)), criterion="bn_scale")
    with pytest.raises(BudgetError, match="1 are excluded"):
        zc.prune(free, macs=0.5, layout=zc.analyze(free, torch.randn(2, 6)), exclude="0.weight")

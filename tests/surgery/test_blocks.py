"""Residual blocks: found by running, removed whole, and back from a file."""

import copy
import json

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.errors import CompressError, VariantError
from zoo_compress.surgery.blocks import remove_blocks, residual_blocks

SIZE = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
KNOWN = {
    "resnet18": ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"],
    "test_convnext": ["stages.0.blocks.0", *(f"stages.{i}.blocks.{j}" for i, count in ((1, 2), (2, 4), (3, 2)) for j in range(count))],
    "test_vit": [f"blocks.{i}" for i in range(6)],
    "mobilenetv2_100": [f"blocks.{i}.{j}" for i, count in enumerate((1, 2, 3, 4, 3, 3, 1)) for j in range(1, count)],
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_blocks_are_those_whose_shape_stays(name):
    found, _ = residual_blocks(timm.create_model(name))
    assert sorted(found) == sorted(KNOWN[name])


class Branch(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def branch(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        return x + self.branch(x)


class AfterGelu(Branch):
    def forward(self, x):
        return nn.functional.gelu(super().forward(x))


class AfterRelu(Branch):
    def forward(self, x):
        return nn.functional.relu(super().forward(x))


class InPlace(Branch):
    def forward(self, x):
        out = self.branch(x)
        out += x
        return out.relu_()


class Gated(Branch):
    """The branch ends in a module whose output is no multiple of its weights."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]

    def __init__(self):
        super().__init__()
        self.gate = self.Gate()

    def branch(self, x):
        return self.gate(super().branch(x))


class Scaled(Branch):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def branch(self, x):
        return super().branch(x) * self.gamma


class Rolled(Branch):
    """What it adds is made of a module's output, by moving its elements."""

    def branch(self, x):
        return super().branch(x).roll(1, -1).flip(-2).contiguous()


class Squared(Branch):
    def branch(self, x):
        return super().branch(x) ** 2


class Twice(Branch):
    """Runs its convolution twice."""

    def branch(self, x):
        return super().branch(super().branch(x))


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.block = kind()
        self.tied = None
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("kind", [Branch, AfterRelu, InPlace, Scaled, Rolled])
def test_what_a_block_adds(kind):
    found, refused = residual_blocks(Net(kind), torch.randn(2, 3, 12, 12))
    assert found["block"].ends == ("block.norm",)
    assert not refused


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AfterGelu, "still changes what it is given"),
        (Gated, r"what block.gate \(Gate\) adds does not scale with its weights"),
        (Squared, "nor in proportion to that of block.norm"),
    ],
)
def test_what_cannot_be_removed_has_a_reason(kind, reason):
    found, refused = residual_blocks(Net(kind), torch.randn(2, 3, 12, 12))
    assert not found
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refused["block"])


def test_a_branch_that_runs_twice_is_no_block():
    assert residual_blocks(Net(Twice), torch.randn(2, 3, 12, 12))[0] == {}


@pytest.mark.parametrize(("name", "gone"), [("resnet18", ["layer1.0", "layer3.1"]), ("test_vit", ["blocks.2", "blocks.3"])])
def test_a_model_without_blocks_is_one_whose_blocks_add_nothing(name, gone):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    zeroed = copy.deepcopy(model)
    for path in gone:
        for end in residual_blocks(model)[0][path].ends:
            for parameter in zeroed.get_submodule(end).parameters():
                nn.init.zeros_(parameter)
    image = torch.randn(2, *model.pretrained_cfg["input_size"])
    small = remove_blocks(model, gone)
    torch.testing.assert_close(small(image), zeroed(image))
    assert not any(name.startswith(tuple(f"{path}." for path in gone)) for name in small.state_dict())
    assert zc.analyze(small).macs() < zc.analyze(model).macs()
    zc.verify(small, zc.analyze(small))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=10, **SIZE).eval()


def variant(model):
    return model._model_args["variant"]


def test_round_trips_with_other_methods(base, tmp_path):
    image = torch.randn(2, 3, 64, 64)
    low = zc.factorize(base, macs=0.8)
    inside = next(path.rpartition(".")[0] for path in variant(low)["factors"] if path.startswith("layer1.0."))
    models = [remove_blocks(base, ["layer1.1"])]
    models.append(zc.prune(models[0], macs=0.6))
    models.append(remove_blocks(models[1], ["layer2.1"]))
    models.append(remove_blocks(low, [inside]))
    models.append(zc.factorize(models[2], macs=0.8))
    for i, model in enumerate(models):
        zc.save(model, tmp_path / str(i))
        again = timm.create_model(f"local-dir:{tmp_path / str(i)}", pretrained=True).eval()
        assert torch.equal(again(image), model.eval()(image))
    assert variant(models[2])["removed"] == ["layer1.1", "layer2.1"]
    assert not any(path.startswith(inside) for path in variant(models[3])["factors"])
    features = timm.create_model(f"local-dir:{tmp_path / '2'}", pretrained=True, features_only=True).eval()
    assert [f.shape[1] for f in features(image)] == features.feature_info.channels()


@pytest.mark.parametrize(
    ("path", "message"), [("layer2.0", "no residual block; there are"), ("nowhere", "no residual block"), ("", "no resid")]
)
def test_only_residual_blocks_are_removed(base, path, message):
    with pytest.raises(CompressError, match=message):
        remove_blocks(base, [path])


@pytest.mark.parametrize("removed", [["layer9.0"], [""], [3], "layer1.0", ["layer1.1", "layer1.1.conv1"], ["layer1.1", "layer1.1"]])
def test_damaged_records_are_refused(base, tmp_path, removed):
    zc.save(remove_blocks(base, ["layer1.1"]), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["model_args"]["variant"]["removed"] = removed
    path.write_text(json.dumps(config))
    with pytest.raises(VariantError):
        zc.load(tmp_path)


@pytest.mark.parametrize(("name", "path"), [("resnet18", "layer3.1"), ("mobilenetv2_100", "blocks.1.1"), ("test_vit", "blocks.3")])
def test_torchscript_compiles_what_is_left(name, path):
    small = remove_blocks(timm.create_model(name, num_classes=10, **SIZE).eval(), [path])
    images = torch.randn(2, 3, *small.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(small)(images), small(images))

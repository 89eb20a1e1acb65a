"""Which places exits take, on timm's small models."""

import re

import pytest
import timm
import torch
from torch import nn

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.surgery.places import choose, places
from zoo_compress.surgery.trace import default_input


@pytest.fixture(scope="module")
def vit():
    with torch.device("meta"):
        return timm.create_model("test_vit", num_classes=10)


def chosen(model, wanted):
    return choose(model, default_input(model), wanted)[0]


def test_fractions_are_those_of_the_layouts_macs(model):
    found = {place.path: place for place in places(model, default_input(model))}
    with torch.device("meta"):
        head = timm.create_model("test_resnet", num_classes=0)
    assert found["fc"].fraction == 1
    assert found["layer4"].fraction == pytest.approx(zc.analyze(head).macs() / zc.analyze(model).macs())
    assert 0 < found["layer1"].fraction < found["layer2"].fraction < 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_count_is_spread_evenly(vit, count):
    found = {place.path: place for place in places(vit, default_input(vit))}
    at = [found[exit.place].fraction for exit in chosen(vit, count)]
    # Blocks of this network are a seventh of it: nothing is further from where it should be than half of one.
    assert at == pytest.approx([(i + 1) / (count + 1) for i in range(count)], abs=1 / 14 + 0.01)
    assert at == sorted(at)


def test_a_class_token_is_read_once_it_has_seen_the_image(vit):
    assert [(e.place, e.pool) for e in chosen(vit, ("norm_pre", "blocks.0"))] == [("norm_pre", "mean"), ("blocks.0", "first")]


@pytest.mark.parametrize(
    ("name", "place", "format"),
    [
        ("test_resnet", "layer1", "NCHW"),
        ("test_mambaout", "stages.1", "NHWC"),
        ("test_vit", "blocks.1", "NLC"),
        ("test_vit4", "blocks.1", "NLC"),
    ],
)
def test_formats_come_from_where_the_channel_axis_runs(name, place, format):
    with torch.device("meta"):
        model = timm.create_model(name)
    (exit,) = chosen(model, (place,))
    assert exit.format == format
    assert exit.features == next(e["num_chs"] for e in model.feature_info if e["module"] == place)


@pytest.mark.parametrize(("name", "place"), [("vit_tiny_patch16_dinov3_qkvb", "blocks.1"), ("test_efficientnet", "blocks.1")])
def test_positions_that_an_axis_runs_along_are_not_taken_for_channels(name, place):
    with torch.device("meta"):
        model = timm.create_model(name)
    (exit,) = chosen(model, (place,))
    assert exit.features == next(e["num_chs"] for e in model.feature_info if e["module"] == place)


@pytest.mark.parametrize("name", ["regnetx_002", "test_resnet", "test_vit"])
def test_no_exit_is_at_the_very_end(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    found = {place.path: place for place in places(model, default_input(model))}
    assert all(found[exit.place].fraction < 0.97 for exit in chosen(model, 4))


def test_a_grid_is_as_fine_as_the_head_stays_small(model):
    def grids(classes, grid=None):
        model.num_classes = classes
        found = choose(model, default_input(model), 3, grid)[0]
        return [(exit.grid, exit.features) for exit in found]

    parameters, classes = sum(parameter.numel() for parameter in model.parameters()), model.num_classes
    try:
        few, many = grids(10), grids(500)
        for number, exits in ((10, few), (500, many)):
            for grid, features in exits:
                assert grid == 1 or grid**2 * features * number <= 0.05 * parameters
                assert grid == 4 or (grid + 1) ** 2 * features * number > 0.05 * parameters
        assert few > many
        assert {grid for grid, _ in grids(500, grid=3)} == {3}
        assert {grid for grid, _ in grids(0)} == {1}
    finally:
        model.num_classes = classes


def test_a_grid_is_no_finer_than_the_map():
    net = zc.add_exits(
        timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)}), ["layer3"], grid=16
    )
    assert net.record.places[0].grid == 2
    assert net.exits[0].fc.in_features == 4 * net.record.places[0].features


def test_names_are_put_in_the_order_they_run(vit):
    assert [e.place for e in chosen(vit, ("blocks.3", "blocks.1"))] == ["blocks.1", "blocks.3"]


def test_fractions_take_the_nearest_places(vit):
    assert [e.place for e in chosen(vit, (0.27, 0.72))] == ["blocks.0", "blocks.3"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (("block.1",), "no module 'block.1'; did you mean blocks.1"),
        (("head",), "nothing is computed after 'head'"),
        (("blocks.1.attn.attn_drop",), "does not run by itself"),
        (("blocks",), None),
    ],
)
def test_places_that_are_none(vit, wanted, said):
    if said is None:
        assert [e.place for e in chosen(vit, wanted)] == ["blocks"]
        return
    with pytest.raises(CompressError, match=said):
        chosen(vit, wanted)


def test_too_many_says_how_many_there_are(vit):
    with pytest.raises(CompressError, match="expected at most") as error:
        chosen(vit, 99)
    most = int(re.search(r"at most (\d+)", str(error.value)).group(1))
    assert len(chosen(vit, most)) == most
    with pytest.raises(CompressError, match=f"expected at most {most} of them, .* found {most + 1}"):
        chosen(vit, most + 1)


def test_a_module_that_runs_twice_is_refused():
    twice = timm.create_model("test_resnet")
    twice.layer2[0].act2 = twice.layer1[0].act2
    with pytest.raises(CompressError, match=r"'layer1.0.act2' runs more than once"):
        chosen(twice, ("layer1.0.act2",))


def test_inside_a_residual_block_rows_are_held(model):
    exits, boundaries = choose(model, default_input(model), ("layer2.0.conv1", "layer3"))
    assert [exit.place for exit in exits] == ["layer2.0.conv1", "layer3"]
    assert [boundary is None for boundary in boundaries] == [True, False]


class Counting(nn.Module):
    """Six blocks of equal cost; after the first three, the size of the batch is kept as a number until the end."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(6))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        for block in self.blocks[:3]:
            x = block(x)
        samples = x.shape[0]
        for block in self.blocks[3:]:
            x = block(x)
        return self.head(x.reshape(samples, 8, -1).mean(2))


def test_where_rows_are_held_is_chosen_last():
    model, example = Counting(), torch.empty(2, 8, 4, 4)

    def found(wanted):
        exits, boundaries = choose(model, example, wanted)
        return [(exit.place, boundary is not None) for exit, boundary in zip(exits, boundaries, strict=True)]

    assert found(1) == [("blocks.2", True)]
    assert found((0.17, 0.5)) == [("blocks.0", True), ("blocks.2", True)]
    assert found((0.3, 0.85)) == [("blocks.1", True), ("blocks.4", False)]

"""Accuracy against average MACs: the table says what `infer` does."""

import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress.curve import curve, format_curves
from zoo_compress.errors import CompressError

SIZE = {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}


def batches(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 3, 20)[:, None, None, None]
    return [(scale * torch.randn(20, 3, 32, 32, generator=generator), torch.randint(10, (20,), generator=generator)) for _ in range(count)]


def make(widths=None):
    torch.manual_seed(0)
    net = zc.add_exits(timm.create_model("test_resnet", num_classes=10, **SIZE), 2)
    net = zc.slim(net, widths) if widths else net
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("confidence", ["max_softmax", "margin"])
def test_every_line_is_what_infer_does(confidence):
    net, held_out, test = make(), batches(1), batches(2)
    points = {point.label: point for point in curve(net, held_out, test, budgets=(0.01, 0.6, 1.0), confidence=confidence)}
    assert list(points) == ["exit 0", "exit 1", "end", "budget 1%", "budget 60%", "budget 100%"]
    costs, base = net.costs(), net.all_costs().base
    targets = torch.cat([target for _, target in test])

    def top1(**arguments):
        return float(100 * (torch.cat([net.infer(x, **arguments).argmax(1) for x, _ in test]) == targets).double().mean())

    for exit, label in enumerate(["exit 0", "exit 1", "end"]):
        assert points[label].top1 == pytest.approx(top1(exit=exit))
        assert points[label].macs == costs[exit]
        assert points[label].share == costs[exit] / base
    assert points["budget 1%"].macs is None
    for budget in (0.6, 1.0):
        net.calibrate(held_out, budget, confidence=confidence)
        left = torch.cat([net.infer(x, return_exits=True)[1] for x, _ in test]).tolist()
        point = points[f"budget {budget:.0%}"]
        assert point.fractions == pytest.approx([left.count(exit) / 60 for exit in range(3)])
        assert point.macs == pytest.approx(sum(costs[exit] for exit in left) / 60)
        assert point.share == pytest.approx(point.macs / base)
        assert point.top1 == pytest.approx(top1())
    assert points["budget 100%"].share > 0.95 > points["budget 60%"].share


def test_every_width_is_in_the_table_and_knobs_stay():
    net, held_out, test = make((0.5, 1.0)), batches(1, 1), batches(2, 1)
    net.set_width(0.5)
    net.set_exit(1)
    points = curve(net, held_out, test, budgets=(0.5,))
    assert [(point.label, point.width) for point in points] == [
        (label, width) for width in (1.0, 0.5) for label in ("exit 0", "exit 1", "end", "budget 50%")
    ]
    assert net.macs() == net.layout.macs(net.sizes_at(0.5)[0])
    assert net.chosen_exit == 1
    for point in points:
        if point.label == "exit 0":
            net.set_width(point.width)
            assert point.macs == net.costs()[0]
    text = format_curves([points])
    assert text.count("budget 50%") == 2
    assert "out of reach" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["×1", "×0.5"]


def test_several_seeds_have_mean_and_spread():
    net, held_out = make(), batches(1, 1)
    curves = [curve(net, held_out, batches(seed, 1)) for seed in (2, 3, 4)]
    mean = sum(points[0].top1 for points in curves) / 3
    line = format_curves(curves).splitlines()[1]
    assert f"{mean:.2f} ± " in line
    other = curve(net, held_out, held_out, budgets=(0.6,))
    with pytest.raises(CompressError, match="same exits, widths and budgets"):
        format_curves([curves[0], other])


def test_what_is_refused():
    with pytest.raises(CompressError, match="expected a network with exits, found ResNet"):
        curve(timm.create_model("test_resnet"), [], [])
    with pytest.raises(CompressError, match="at least one batch"):
        curve(make(), [], batches(2))

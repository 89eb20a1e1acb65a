"""Pictures of images by the exit at which they leave."""

import builtins

import numpy as np
import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.sharing.gallery import _pixels, _row, by_exit


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    cfg = {"input_size": (1, 32, 32), "mean": (0.25,), "std": (0.5,)}
    return zc.add_exits(timm.create_model("test_resnet", num_classes=10, in_chans=1, pretrained_cfg_overlay=cfg), 2).eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(30, 1, 32, 32) * torch.linspace(0.1, 3, 30)[:, None, None, None]


def test_images_are_drawn_where_they_leave(net, images, tmp_path):
    pytest.importorskip("matplotlib")
    net.calibrate([images], 0.7)
    left = net.infer(images, return_exits=True)[1]
    counts = zc.plot_exits(net, [images[:20], (images[20:], torch.zeros(10))], tmp_path / "exits.png", columns=4)
    assert counts == tuple(torch.bincount(left, minlength=3).tolist())
    first = (tmp_path / "exits.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    zc.plot_exits(net, [images], tmp_path / "again.png", columns=4)
    assert (tmp_path / "again.png").read_bytes() == first
    assert by_exit(net, [images], [None, 0.0])[1].tolist() == [1] * 30


def test_pixels_are_those_before_normalisation(net):
    grey = torch.rand(2, 1, 5, 6)
    assert _pixels(net, (grey - 0.25) / 0.5) == pytest.approx(grey[:, 0].numpy(), abs=1e-6)
    row = _row(np.zeros((1, 5, 6)), 3, np.zeros((1, 5, 6)))
    assert row.shape == (5, 20)
    assert row[:, :6].sum() == 0
    assert row[:, 6:].min() == 1


def test_what_is_refused(net, images, tmp_path, monkeypatch):
    fresh = zc.add_exits(timm.create_model("test_resnet", num_classes=10, in_chans=1), 1)
    with pytest.raises(CompressError, match="expected threshold=, or thresholds stored"):
        zc.plot_exits(fresh, [images], tmp_path / "x.png")
    with pytest.raises(CompressError, match="network with exits, found ResNet"):
        zc.plot_exits(timm.create_model("test_resnet"), [images], tmp_path / "x.png")
    with pytest.raises(CompressError, match="columns of at least 1"):
        zc.plot_exits(net, [images], tmp_path / "x.png", threshold=0.5, columns=0)
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CompressError, match="pictures need matplotlib"):
        zc.plot_exits(net, [images], tmp_path / "x.png", threshold=0.5)
    assert not list(tmp_path.iterdir())

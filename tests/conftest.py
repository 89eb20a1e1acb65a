"""Every test runs on one thread and starts from the same seed."""

import pytest
import timm
import torch

import zoo_compress as zc

torch.set_num_threads(1)


def pytest_addoption(parser):
    group = parser.getgroup("zoo_compress", "architectures of tests/test_models.py")
    group.addoption("--all-families", action="store_true", help="the smallest architecture of each of timm's model files")
    group.addoption("--models", action="append", default=[], metavar="GLOB", help="architectures of timm's registry; repeatable")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    """A small residual network with random weights, in eval mode; tests don't change it."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10).eval()


@pytest.fixture(scope="module")
def layout(model):
    return zc.analyze(model)

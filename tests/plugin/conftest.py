"""A small pruned checkpoint, made once."""

import shutil

import pytest
import timm
import torch

import zoo_compress  # noqa: F401 (registers the plugin's names)
from zoo_compress.plugin import save

NAME = "test_resnet__pruned"


@pytest.fixture(scope="session")
def small():
    torch.manual_seed(0)
    return timm.create_model(NAME, keep=0.5).eval()


@pytest.fixture(scope="session")
def saved(small, tmp_path_factory):
    """Directory with the checkpoint; not to be changed."""
    path = tmp_path_factory.mktemp("saved")
    save(small, path)
    return path


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def images(small):
    torch.manual_seed(1)
    return torch.randn(2, *small.pretrained_cfg["input_size"])

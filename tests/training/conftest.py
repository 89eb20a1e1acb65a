"""A tiny model and loaders over real digits, small enough to train in a second."""

from dataclasses import replace

import pytest
import timm
import torch

from zoo_compress.training.config import DataConfig
from zoo_compress.training.data import eval_loader, train_loader
from zoo_compress.training.sources import ArrayDataset, default_pretrained_cfg, open_source


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits():
    return open_source(DataConfig(source="digits"), in_chans=1)


@pytest.fixture
def make_model():
    def make(seed: int = 0, **overlay):
        torch.manual_seed(seed)
        cfg = {**default_pretrained_cfg("digits", 1), "input_size": (1, 16, 16), **overlay}
        return timm.create_model("test_resnet", num_classes=10, in_chans=1, drop_rate=0.1, pretrained_cfg_overlay=cfg)

    return make


@pytest.fixture(scope="session")
def few_digits(digits):
    return replace(digits, train=first(digits.train, 260), test=first(digits.test, 100))


def first(dataset, count):
    return ArrayDataset(dataset.images[:count], dataset.labels[:count], in_chans=1)


@pytest.fixture
def make_loaders(few_digits, make_model):
    def make(source=few_digits, **config):
        data, model = DataConfig(source="digits", **config), make_model()
        return train_loader(source, data, model), eval_loader(source, data, model)

    return make

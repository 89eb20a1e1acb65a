"""A small pruned checkpoint, and a run that made it."""

import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress.runner import run

RECIPE = """
description: a very small test
model: {{name: test_resnet, args: {{num_classes: 10, in_chans: 1}}, pretrained_cfg: {{input_size: [1, 8, 8]}}}}
data: {{source: digits, batch_size: 64}}
seed: {seed}
output: {output}
stages: [train: {{epochs: 2, lr: 3e-3}}, prune: {{macs: 0.6, round_to: 4, exclude: []}}, evaluate, save]
measure: {{runs: 2}}
"""


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return timm.create_model("test_resnet__pruned", keep=0.5).eval()


@pytest.fixture(scope="module")
def checkpoint(small, tmp_path_factory):
    """Folder of the saved model; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    zc.save(small, folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Output folders of the same recipe run with two seeds; not to be changed."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("run")
        (folder / "recipe.yaml").write_text(RECIPE.format(seed=seed, output=folder / "out"))
        run(folder / "recipe.yaml", log=lambda line: None)
        folders.append(folder / "out")
    return folders

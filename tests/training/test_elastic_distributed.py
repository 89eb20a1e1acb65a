"""Two processes end with the weights that one ends with, and hang on nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("train_elastic.py")


def weights(tmp_path, *command):
    out = tmp_path / "weights.safetensors"
    launcher, parts, names = command
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(SCRIPT), str(out), parts, *names],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(out)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("test_vit", "1"), ("test_resnet", "2")],
    ids=["no batch statistics", "statistics of each process's part of the batch"],
)
def test_two_processes_do_as_one(tmp_path, name, parts):
    one = weights(tmp_path, [], parts, [name])
    two = weights(tmp_path, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], "1", [name])
    assert one.keys() == two.keys()
    for method, expected in one.items():
        assert torch.allclose(two[method], expected, atol=1e-4), method

"""Every test runs on one thread and starts from the same seed. What talks to the Hub talks to a server of its protocol on this machine."""

import atexit
import os
import shutil
import tempfile

import pytest

from .hub_server import TOKEN, HubServer

SERVER = HubServer()
SERVER.start()  # whatever a test asks of the Hub is answered, if only by a refusal
CACHE = tempfile.mkdtemp(prefix="zoo_compress-hub-cache-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
# The Hub's client reads these when it is imported, which timm does.
os.environ.update(HF_ENDPOINT=SERVER.url, HF_HOME=CACHE, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ.pop("HF_TOKEN", None)

import timm  # noqa: E402
import torch  # noqa: E402

import zoo_compress as zc  # noqa: E402

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


@pytest.fixture
def hub(monkeypatch):
    """The server, empty, with a client that has downloaded nothing yet, is logged in, and does not wait between attempts."""
    import huggingface_hub

    SERVER.reset()
    shutil.rmtree(os.path.join(CACHE, "hub"), ignore_errors=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return SERVER

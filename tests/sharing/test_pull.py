"""Loading from the Hub by name: every way it fails ends in one clear error, and nothing is executed or allocated for a file's sake."""

import errno
import json
import os
import pickle
import resource
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from zoo_compress.errors import CompressError, HubError, VariantError
from zoo_compress.sharing.pull import pull

from ..hub_server import EXPIRED

REPO = "me/half"
NAME = f"hf-hub:{REPO}@v1"


@pytest.fixture
def files(checkpoint):
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.fixture
def published(hub, files):
    put(hub, files)
    return hub


def put(hub, files, **options):
    hub.repos.pop(REPO, None)
    oid = hub.put(REPO, files, **options)
    hub.repos[REPO].tags["v1"] = oid


def refused(said, kind=CompressError, name=NAME, **kwargs):
    with pytest.raises(kind, match=said) as caught:
        timm.create_model(name, pretrained=True, **kwargs)
    assert isinstance(caught.value, CompressError)
    text = str(caught.value)
    assert "\n" not in text
    assert "hf_" not in text.replace("hf_hub", "")
    return text


class TestRefused:
    def test_no_repository(self, hub):
        refused("me/half@v1: no such repository")
        refused("me/half@v1: no such repository", RepositoryNotFoundError)

    def test_a_plain_model_too(self, hub):
        refused("me/plain: no such repository", RepositoryNotFoundError, "hf-hub:me/plain")

    def test_private_repository_of_somebody_else(self, hub, files, monkeypatch):
        put(hub, files, private=True, owner="other")
        refused("a private one that this token")
        monkeypatch.delenv("HF_TOKEN")
        refused("no token, an expired or wrong one, or no such repository")

    def test_no_revision(self, published):
        refused("me/half@v9: no revision 'v9'", RevisionNotFoundError, f"hf-hub:{REPO}@v9")

    def test_gated(self, hub, files):
        put(hub, files, gated=True, owner="other")
        refused("me/half@v1: gated: .* ask for access", GatedRepoError)

    def test_expired_token(self, published, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", EXPIRED)
        assert EXPIRED not in refused("expired or wrong one.* `hf auth login`")

    @pytest.mark.parametrize("name", ["hf-hub:half@v1@v2", "hf-hub:me/ha lf", "hf-hub:me/a/b"])
    def test_bad_names(self, hub, name):
        refused("expected OWNER/NAME", name=name)

    def test_the_hub_fails(self, published):
        with published.fault("head", status=503):
            refused("the Hub failed with status 503; try again later|not in the cache")

    def test_nobody_answers(self, published):
        with published.fault("head", silent=True):
            refused("the connection failed or broke off")

    def test_offline(self, published, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        refused("not in the cache, and HF_HUB_OFFLINE forbids")
        monkeypatch.undo()

    def test_what_was_downloaded_serves_offline(self, published, monkeypatch):
        timm.create_model(NAME, pretrained=True)
        with published.fault("head", status=503):
            timm.create_model(NAME, pretrained=True)

    def test_only_a_pickle(self, hub, files, tmp_path):
        payload = pickle.dumps({"fc.weight": Payload(tmp_path / "executed")})
        put(hub, {"config.json": files["config.json"], "pytorch_model.bin": payload})
        refused(r"no model\.safetensors; other formats are not read", VariantError)
        assert "get" not in [step for step, path, _ in hub.log if "pytorch_model" in path]
        assert not (tmp_path / "executed").exists()

    def test_no_config(self, hub, files):
        put(hub, {"model.safetensors": files["model.safetensors"]})
        refused(r"no config\.json in it")

    def test_config_names_a_pickle(self, hub, files, tmp_path):
        config = json.loads(files["config.json"])
        config["pretrained_cfg"]["hf_hub_filename"] = "weights.bin"
        put(hub, {**files, "config.json": json.dumps(config).encode(), "weights.bin": pickle.dumps(Payload(tmp_path / "executed"))})
        refused("expected a safetensors file, found 'weights.bin'")
        assert not (tmp_path / "executed").exists()


class TestDamage:
    """What arrives damaged is refused, and not kept: the next attempt downloads it again."""

    @pytest.mark.parametrize("step", ["get", "blob"])
    def test_the_connection_drops(self, published, step):
        with published.fault(step, drop=True, headers={"Accept-Ranges": "none"}, body=lambda content: content):
            refused("the connection failed or broke off")
        timm.create_model(NAME, pretrained=True)

    def test_a_drop_is_overcome(self, published, small):
        with published.fault("blob", drop=True, times=2):
            again = timm.create_model(NAME, pretrained=True)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())

    @pytest.mark.parametrize("step", ["get", "blob"])
    def test_truncated(self, published, step):
        with published.fault(step, body=lambda content: content[:-100]):
            refused("arrived incomplete|expected JSON")
        if step == "blob":
            timm.create_model(NAME, pretrained=True)

    def test_truncated_where_it_is_stored(self, published):
        """The announced size is that of the truncated file, so the client is content."""
        repo = published.repos[REPO]
        _, oid, size = repo.commits[repo.tags["v1"]]["model.safetensors"]
        whole = published.lfs[oid]
        published.lfs[oid] = whole[: size // 2]
        repo.commits[repo.tags["v1"]]["model.safetensors"] = ("lfs", oid, size // 2)
        refused("me/half@v1: .*expected a whole safetensors file, found .* bytes.*try again")
        published.lfs[oid] = whole
        repo.commits[repo.tags["v1"]]["model.safetensors"] = ("lfs", oid, size)
        timm.create_model(NAME, pretrained=True)

    def test_wrong_hash(self, published):
        with published.fault("blob", body=lambda content: content[:-1] + bytes([content[-1] ^ 1])):
            refused("not the file that the Hub announced .*removed from the cache: try again", VariantError)
        timm.create_model(NAME, pretrained=True)

    def test_damaged_weights_are_not_kept_by_pull(self, published, tmp_path):
        with (
            published.fault("blob", body=lambda content: content[:-1] + bytes([content[-1] ^ 1])),
            pytest.raises(VariantError, match=r"me/half@v1: .*not the file that the Hub announced .*removed from the cache"),
        ):
            pull("me/half@v1", tmp_path / "there")
        assert list(tmp_path.iterdir()) == []
        pull("me/half@v1", tmp_path / "there")

    @pytest.mark.parametrize("how", [lambda path: pull("me/half@v1", path), lambda path: timm.create_model(NAME)], ids=["pull", "timm"])
    def test_a_damaged_config_is_not_kept(self, published, tmp_path, how):
        with published.fault("get", body=lambda content: b"?" + content[1:]), pytest.raises(VariantError, match="expected JSON"):
            how(tmp_path / "there")
        how(tmp_path / "there")

    def test_damaged_in_a_cache_that_is_read_only(self, published, monkeypatch):
        def forget(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr("zoo_compress.plugin.weights.forget", forget)
        with published.fault("blob", body=lambda content: content[:-1] + bytes([content[-1] ^ 1])):
            refused(r"not the file that the Hub announced.* cannot be removed from the cache \(Permission denied\)", VariantError)

    def test_a_hash_that_is_a_path_removes_no_file_outside_the_cache(self, published, tmp_path):
        mine, cache = tmp_path / "mine", tmp_path / "cache"
        mine.write_text("not a checkpoint")
        path = os.path.relpath(mine, cache / "models--me--half" / "blobs")
        repo = published.repos[REPO]
        repo.commits[repo.tags["v1"]]["model.safetensors"] = ("lfs", path, mine.stat().st_size)
        refused("expected a whole safetensors file", VariantError, cache_dir=cache)
        assert mine.read_text() == "not a checkpoint"

    def test_weights_of_another_config(self, hub, files):
        content = files["model.safetensors"]
        put(hub, {**files, "model.safetensors": content[:-1] + bytes([content[-1] ^ 1])})
        refused(r"not the file that config\.json was written with", VariantError)


class Payload:
    """Makes a directory when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def variant(change):
    return lambda config: change(config["model_args"]["variant"])


HOSTILE = {
    "newer record": (variant(lambda v: v.update(version=2)), "newer zoo_compress"),
    "newer method": (lambda c: c.update(architecture="test_resnet__quantized"), "'test_resnet__quantized' is unknown.*upgrade"),
    "unknown base": (lambda c: c.update(architecture="resnet_from_2030__pruned"), "upgrade zoo_compress, or timm"),
    "no such module": (variant(lambda v: v["params"].update({"layer9.weight": ["1"]})), "no such parameter"),
    "__class__": (variant(lambda v: v["attributes"].update({"__class__": "1"})), "__class__.*no such plain attribute"),
    "forward": (variant(lambda v: v["attributes"].update({"forward": "1"})), "forward.*no such plain attribute"),
    "size of 10**12": (variant(lambda v: v["sizes"].update(dict.fromkeys(v["sizes"], 10**12))), "1000000000000"),
    "size beyond the base": (variant(lambda v: v["sizes"].update(dict.fromkeys(v["sizes"], 2**30))), "within the base's"),
    "10**12 classes": (lambda c: c["model_args"].update(num_classes=10**12), "out of all proportion"),
    "10**12 classes, another way": (
        lambda c: (c.update(num_classes=10**12), c["pretrained_cfg"].update(num_classes=10**12)),
        "expected the 1000000000000 classes of its config, found 1000",
    ),
    "10**12 channels": (lambda c: c["model_args"].update(in_chans=10**12), "out of all proportion"),
    "wide base": (variant(lambda v: v.update(base_args={"channels": [10**9] * 4})), "out of all proportion"),
    "deep base": (variant(lambda v: v.update(base_args={"layers": [10**9] * 4})), "out of all proportion"),
    "factory argument": (
        lambda c: c["model_args"].update(pretrained_cfg_overlay={"url": "http://127.0.0.1:9/x"}),
        "argument of the factory",
    ),
    "an argument that is ours": (lambda c: c["model_args"].update(base="x"), "unexpected keyword argument 'base'"),
    "another that is ours": (lambda c: c["model_args"].update(kind="slim"), "unexpected keyword argument 'kind'"),
    "a third that is ours": (lambda c: c["model_args"].update(create="x"), "unexpected keyword argument 'create'"),
    "checkpoint path": (lambda c: c["model_args"].update(checkpoint_path="/etc/passwd"), "argument of the factory"),
    "arguments that are no mapping": (lambda c: c.update(model_args=[1]), r"config\.json: expected"),
    "weights in the config": (lambda c: c["pretrained_cfg"].update(state_dict={"fc.weight": [1]}, custom_load=True), None),
    "no record": (lambda c: c["model_args"].pop("variant"), "'variant' in model_args"),
    "no architecture": (lambda c: c.pop("architecture"), "expected JSON that timm or zoo_compress wrote"),
    "architecture that is no text": (lambda c: c.update(architecture=3), r"config\.json: expected architecture"),
}


@pytest.fixture
def little_memory():
    """What is mapped from now on may take 1 GB together: a larger allocation fails, and would say so in other words."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.usefixtures("little_memory")
class TestHostile:
    @pytest.mark.parametrize("what", HOSTILE)
    def test_config(self, hub, files, what):
        change, said = HOSTILE[what]
        config = json.loads(files["config.json"])
        change(config)
        put(hub, {**files, "config.json": json.dumps(config).encode()})
        if said is None:
            timm.create_model(NAME, pretrained=True)
        else:
            refused(said)

    def test_a_large_base_for_small_weights(self, hub, files):
        """Seven billion parameters, of which the file has some thousands."""
        config = json.loads(files["config.json"])
        config["architecture"] = "vit_7b_patch16_dinov3__pruned"
        config["model_args"]["variant"].update(base="vit_7b_patch16_dinov3", sizes={}, params={}, attributes={})
        put(hub, {**files, "config.json": json.dumps(config).encode()})
        refused("out of all proportion to its weights")

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "null", "[" * 100_000, "\udcff", '{"architecture": {}}'])
    def test_what_is_no_config(self, hub, files, text):
        put(hub, {**files, "config.json": text.encode(errors="surrogateescape")})
        refused(r"config\.json")

    def test_a_header_that_announces_more_than_there_is(self, hub, files):
        config = json.loads(files["config.json"])
        del config["weights_sha256"]
        header = json.dumps({"fc.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
        for weights in (len(header).to_bytes(8, "little") + header, (2**62).to_bytes(8, "little") + b"{}"):
            put(hub, {"config.json": json.dumps(config).encode(), "model.safetensors": weights})
            refused("expected a whole safetensors file")


def test_plain_models_load_as_ever(hub, files, tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model("test_resnet", num_classes=7)
    save_for_hf(model, tmp_path, safe_serialization=True)
    put(hub, {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    again = timm.create_model(NAME, pretrained=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_errors_are_of_this_package():
    assert issubclass(HubError, CompressError)

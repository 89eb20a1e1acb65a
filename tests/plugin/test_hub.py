"""Checkpoints: what is written comes back bit for bit, and what is damaged or hostile is refused."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from functools import partial

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import zoo_compress as zc
from zoo_compress.errors import CompressError, VariantError
from zoo_compress.plugin import hub, load, save, weights
from zoo_compress.plugin.weights import DIGEST

NAME = "test_resnet__pruned"


def rewrite(directory, change):
    """Edit config.json in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def refused(directory, *said, **kwargs):
    """Both ways to load refuse with one CompressError that says so."""
    for create in (lambda: load(directory, **kwargs), lambda: timm.create_model(f"local-dir:{directory}", pretrained=True, **kwargs)):
        with pytest.raises(CompressError) as caught:
            create()
        for part in said:
            assert part in str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize("how", ["save", "timm"])
    def test_bit_equal_through_timm_in_a_fresh_process(self, how, tmp_path):
        names = ["resnet18", "test_vit", "test_efficientnet", "test_byobnet"]
        for name in names:
            torch.manual_seed(0)
            model = timm.create_model(f"{name}__pruned", macs=0.5, scope="local", num_classes=23).eval()
            x = torch.randn(2, *model.pretrained_cfg["input_size"])
            (save if how == "save" else lambda m, d: save_for_hf(m, d, safe_serialization=True))(model, tmp_path / name)
            with torch.no_grad():
                save_file({"x": x, "y": model(x)}, tmp_path / f"{name}.safetensors")
        program = f"""
import timm, torch, zoo_compress
from safetensors.torch import load_file
torch.set_num_threads(1)  # as here: other partitions of a sum round differently
for name in {names!r}:
    model = timm.create_model(f"local-dir:{tmp_path}/{{name}}", pretrained=True).eval()
    seen = load_file(f"{tmp_path}/{{name}}.safetensors")
    with torch.no_grad():
        assert torch.equal(model(seen["x"]), seen["y"]), name
"""
        subprocess.run([sys.executable, "-c", program], check=True)

    def test_exactly_two_files(self, saved):
        assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
        config = json.loads((saved / "config.json").read_text())
        assert config["architecture"] == NAME
        assert config["model_args"]["variant"]["base"] == "test_resnet"
        assert "keep" not in config["model_args"], "the record says it all"

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
    def test_files_are_for_whom_files_are_here(self, saved):
        """Weights were readable by their owner alone."""
        saved.joinpath("of mine").touch()
        modes = {path.stat().st_mode for path in saved.iterdir()}
        saved.joinpath("of mine").unlink()
        assert len(modes) == 1

    def test_saved_again_is_the_same(self, saved, tmp_path):
        save(load(saved), tmp_path)
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()

    def test_other_classes(self, saved, small, images):
        model = load(saved, num_classes=37).eval()
        assert model(images).shape == (2, 37)
        assert torch.equal(model.forward_features(images), small.forward_features(images))

    def test_no_classes(self, saved, small, images):
        model = load(saved, num_classes=0).eval()
        assert torch.equal(model(images), small.forward_head(small.forward_features(images), pre_logits=True))

    def test_other_channels(self, saved, small, images):
        model = load(saved, in_chans=1).eval()
        grey = images[:, :1]
        assert torch.allclose(model(grey), small(grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-5), "timm sums the filters"

    def test_arguments_of_timm(self, saved):
        model = load(saved, drop_rate=0.25, global_pool="max", pretrained_cfg_overlay={"mean": (0.0, 0.0, 0.0)})
        assert model.drop_rate == 0.25
        assert model.global_pool.pool_type == "max"
        assert model.pretrained_cfg["mean"] == (0.0, 0.0, 0.0)

    def test_changes_after_loading_are_saved(self, saved, tmp_path, images):
        model = load(saved, num_classes=37, in_chans=1).eval()
        save(model, tmp_path)
        assert torch.equal(load(tmp_path).eval()(images[:, :1]), model(images[:, :1]))

    def test_half_precision_is_loaded_as_timm_does(self, small, tmp_path):
        half = copy.deepcopy(small).half()
        save(half, tmp_path)
        for name, value in load(tmp_path).state_dict().items():
            assert value.dtype == small.state_dict()[name].dtype
            assert torch.equal(value, half.state_dict()[name].to(value.dtype))

    def test_plain_timm_models(self, tmp_path, images):
        model = timm.create_model("test_resnet", num_classes=5).eval()
        save(model, tmp_path)
        assert torch.equal(load(tmp_path).eval()(images), model(images))

    def test_channels_last_and_ties(self, small, tmp_path, images):
        model = timm.create_model(NAME, keep=0.5).eval().to(memory_format=torch.channels_last)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        twin = next(n for n in norms[1:] if n.weight.shape == norms[0].weight.shape)
        twin.weight = norms[0].weight
        save(model, tmp_path)
        again = load(tmp_path).eval()
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


class TestHub:
    """What the client downloads stands in for the Hub itself."""

    @pytest.fixture
    def repository(self, checkpoint, monkeypatch):
        def download(model_id, filename, cache_dir=None):
            assert model_id == "me/half@v1"
            if not (checkpoint / filename).exists():
                raise EntryNotFoundError(f"404: {filename}")
            return str(checkpoint / filename)

        for module in (timm.models._hub, weights):
            monkeypatch.setattr(module, "download_from_hf", download)
        return checkpoint

    def test_round_trip(self, repository, small, images):
        model = timm.create_model("hf-hub:me/half@v1", pretrained=True).eval()
        assert torch.equal(model(images), small(images))

    def test_damage_is_noticed(self, repository):
        weights = repository / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        with pytest.raises(VariantError, match="sha256"):
            timm.create_model("hf-hub:me/half@v1", pretrained=True)

    def test_pickles_are_not_read(self, repository):
        (repository / "model.safetensors").rename(repository / "pytorch_model.bin")
        with pytest.raises(VariantError, match=r"me/half@v1: no model\.safetensors"):
            timm.create_model("hf-hub:me/half@v1", pretrained=True)


class TestDamage:
    def test_no_directory(self, tmp_path):
        with pytest.raises(CompressError, match=r"no config\.json"):
            load(tmp_path / "nothing")

    def test_broken_json(self, checkpoint):
        (checkpoint / "config.json").write_text("{")
        with pytest.raises(CompressError, match=r"config\.json: expected JSON"):
            load(checkpoint)

    @pytest.mark.parametrize("text", ["[]", "{}", '{"architecture": 3}', '{"architecture": "no_such_model"}'])
    def test_unknown_architecture(self, checkpoint, text):
        (checkpoint / "config.json").write_text(text)
        with pytest.raises(CompressError, match=r"architecture: expected a model timm .* knows"):
            load(checkpoint)

    @pytest.mark.parametrize("left", [0.9, 0.5, 0.01, 0.0])
    def test_truncated_weights(self, checkpoint, left):
        weights = checkpoint / "model.safetensors"
        os.truncate(weights, int(weights.stat().st_size * left))
        refused(checkpoint, "model.safetensors", "expected a whole safetensors file", f"found {weights.stat().st_size} bytes")

    def test_flipped_bit(self, checkpoint):
        weights = checkpoint / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        refused(checkpoint, "model.safetensors", "sha256", "damaged")

    def test_config_of_another_save(self, checkpoint):
        """A crash between the two renames leaves this."""
        torch.manual_seed(9)
        other = timm.create_model(NAME, keep=0.5)
        save_file({name: value.clone() for name, value in other.state_dict().items()}, checkpoint / "model.safetensors")
        refused(checkpoint, "not the file that config.json was written with", "save again")
        rewrite(checkpoint, lambda config: config.pop(DIGEST))
        load(checkpoint)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda s: s.pop("fc.weight"), ["'fc.weight'", "expected", "found none"]),
            (lambda s: s.update(extra=torch.ones(3)), ["'extra'", "expected none", "(3,) float32"]),
            (lambda s: s.update({"fc.bias": torch.ones(3)}), ["'fc.bias'", "(1000,) float32", "(3,) float32"]),
            (lambda s: s.update({"fc.bias": torch.ones(1000, dtype=torch.int64)}), ["'fc.bias'", "(1000,) int64"]),
        ],
    )
    def test_weights_of_another_structure(self, checkpoint, change, said):
        weights = checkpoint / "model.safetensors"
        state = load_file(weights)
        change(state)
        save_file(state, weights)
        rewrite(checkpoint, lambda config: config.pop(DIGEST))
        refused(checkpoint, "model.safetensors", *said)

    def test_weights_of_another_structure_are_no_excuse_for_other_classes(self, checkpoint):
        state = load_file(checkpoint / "model.safetensors")
        del state["bn1.weight"]
        save_file(state, checkpoint / "model.safetensors")
        rewrite(checkpoint, lambda config: config.pop(DIGEST))
        refused(checkpoint, "'bn1.weight'", "found none", num_classes=37)


class Payload:
    """Makes a directory when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestHostile:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.pth.tar"])
    @pytest.mark.parametrize("writer", ["pickle", "torch"])
    def test_pickles_are_not_read(self, checkpoint, tmp_path, name, writer):
        (checkpoint / "model.safetensors").unlink()
        payload = {"fc.weight": Payload(tmp_path / "executed")}
        if writer == "pickle":
            (checkpoint / name).write_bytes(pickle.dumps(payload))
        else:
            torch.save(payload, checkpoint / name)
        refused(checkpoint, "no model.safetensors")
        assert not (tmp_path / "executed").exists()

    def test_a_pickle_called_safetensors(self, checkpoint, tmp_path):
        (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
        refused(checkpoint, "expected a whole safetensors file")
        assert not (tmp_path / "executed").exists()

    def test_a_pickle_by_overlay(self, checkpoint, tmp_path):
        torch.save({"fc.weight": Payload(tmp_path / "executed")}, checkpoint / "other.pth")
        refused(checkpoint, "expected a safetensors file", pretrained_cfg_overlay={"file": str(checkpoint / "other.pth")})
        overlay = {"source": None, "file": None, "url": "http://127.0.0.1:9/weights.pth"}
        refused(checkpoint, "found a url", pretrained_cfg_overlay=overlay)
        assert not (tmp_path / "executed").exists()

    def test_plain_models_need_safetensors_too(self, tmp_path):
        save(timm.create_model("test_resnet"), tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save({"fc.weight": Payload(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
        with pytest.raises(VariantError, match=r"no model\.safetensors"):
            load(tmp_path)
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda v: v["params"].update({"layer9.weight": ["1"]}), ["layer9.weight", "no such parameter"]),
            (lambda v: v["attributes"].update({"layer9.width": "1"}), ["layer9.width", "no such plain attribute"]),
            (lambda v: v["attributes"].update({"__class__": "1"}), ["__class__", "no such plain attribute"]),
            (lambda v: v["attributes"].update({"forward": "1"}), ["forward", "no such plain attribute"]),
            (lambda v: v["attributes"].update({"fc.weight": "1"}), ["fc.weight", "no such plain attribute"]),
            (lambda v: v["sizes"].update(dict.fromkeys(v["sizes"], "64")), ["variant.sizes.", "integer", "'64'"]),
            (lambda v: v["sizes"].update(dict.fromkeys(v["sizes"], 10**12)), ["variant.sizes.", "1000000000000"]),
            (lambda v: v["sizes"].update(dict.fromkeys(v["sizes"], 2**31 - 1)), ["within the base's", "2147483647"]),
            (lambda v: v.update(version=2), ["newer zoo_compress"]),
            (lambda v: v.update(base="resnet50"), ["'test_resnet'", "resnet50__pruned"]),
            (lambda v: v["base_args"].update(pretrained_cfg_overlay={"url": "http://127.0.0.1:9/x.pth"}), ["factory"]),
            (lambda v: v["base_args"].update(no_such_argument=1), ["no_such_argument"]),
        ],
    )
    def test_records(self, checkpoint, change, said):
        rewrite(checkpoint, lambda config: change(config["model_args"]["variant"]))
        refused(checkpoint, *said)
        refused(checkpoint, *said, features_only=True)
        refused(checkpoint, *said, num_classes=0)

    def test_no_record(self, checkpoint):
        rewrite(checkpoint, lambda config: config["model_args"].pop("variant"))
        refused(checkpoint, "'variant' in model_args", "found none")

    def test_a_budget_beside_the_record(self, checkpoint):
        refused(checkpoint, "keep", "zoo_compress.prune", keep=0.5)


class TestSaving:
    @pytest.mark.parametrize("what", [torch.nn.Linear(2, 2), object(), None], ids=["module", "object", "None"])
    def test_what_timm_cannot_create_again(self, what, tmp_path):
        with pytest.raises(CompressError, match="save: expected a model"):
            save(what, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_feature_extractors(self, saved, tmp_path):
        with pytest.raises(CompressError, match="feature extractor"):
            save(load(saved, features_only=True), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_arguments_that_are_no_json(self, tmp_path):
        with pytest.raises(CompressError, match="act_layer"):
            save(timm.create_model("test_resnet", act_layer=torch.nn.SiLU), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_file_in_the_way(self, small, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(CompressError, match="cannot save"):
            save(small, tmp_path / "out")
        assert (tmp_path / "out").read_text() == "mine"

    def test_failing_leaves_the_old_checkpoint(self, small, checkpoint, monkeypatch):
        before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        for step in ("save_file", "save_config_for_hf", "_flush"):
            with monkeypatch.context() as patch:
                patch.setattr(hub, step, full)
                with pytest.raises(CompressError, match="No space left"):
                    save(small, checkpoint)
            assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before

    def test_other_files_are_left_alone(self, small, checkpoint):
        (checkpoint / "README.md").write_text("mine")
        save(small, checkpoint)
        assert sorted(os.listdir(checkpoint)) == ["README.md", "config.json", "model.safetensors"]


def test_loading_in_threads(saved, small, images):
    """The step into timm's factory is taken by one thread at a time and passes other models through."""
    outputs, errors = [], []

    def work(index):
        try:
            model = load(saved).eval() if index % 2 else timm.create_model("test_resnet").eval()
            outputs.append(model(images) if index % 2 else None)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    expected = small(images)
    assert all(torch.equal(output, expected) for output in outputs if output is not None)


def test_compiled_models_are_refused_where_the_model_itself_is_meant(tmp_path):
    model = timm.create_model("test_resnet")
    compiled = torch.compile(model)
    for method in (
        zc.analyze,
        partial(zc.prune, macs=0.5),
        partial(zc.sparsify, density=0.5),
        partial(zc.cluster, bits=4),
        zc.quantize,
        partial(zc.factorize, macs=0.7),
        partial(zc.slim, widths=(0.5, 1.0)),
        partial(zc.add_exits, exits=2),
        partial(save, directory=tmp_path),
    ):
        with pytest.raises(CompressError, match=r"expected the ResNet itself, found what torch\.compile made of it"):
            method(compiled)
    assert not list(tmp_path.iterdir())
    assert type(compiled._orig_mod) is type(model)

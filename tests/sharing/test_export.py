"""Other formats and other people's code: outputs are the model's own."""

import copy
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner

import zoo_compress as zc
from zoo_compress.cli import cli
from zoo_compress.errors import CompressError
from zoo_compress.plugin import save
from zoo_compress.sharing import export
from zoo_compress.sharing.int8 import export_int8
from zoo_compress.sharing.pull import pull
from zoo_compress.training.config import DataConfig

HALF = "test_resnet__pruned.digits_half"


@pytest.fixture(scope="module")
def model():
    return timm.create_model(HALF, pretrained=True).eval()


@pytest.mark.parametrize("architecture", [None, "test_vit__pruned"])
def test_onnx(architecture, model, tmp_path):
    import onnxruntime

    if architecture:
        model, data = timm.create_model(architecture, keep=0.5).eval(), None
    else:
        data = DataConfig(source="digits")
    done = export.export_onnx(model, tmp_path / "model.onnx", data)
    assert done.difference <= export.TOLERANCE
    assert done.real is (data is not None)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert done.size == (tmp_path / "model.onnx").stat().st_size
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    for count in (1, 3):
        images = torch.randn(count, *model.pretrained_cfg["input_size"])
        with torch.no_grad():
            expected = model(images).numpy()
        assert np.abs(session.run(None, {name: images.numpy()})[0] - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_resnet", {"in_chans": 6, "pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}),
    ],
)
def test_models_of_other_channels_or_another_size_than_their_architecture(name, args):
    assert export.export_program(timm.create_model(name, **args)).difference <= export.TOLERANCE


@pytest.mark.parametrize(("name", "width", "size"), [("test_resnet", None, 64), ("test_resnet", 0.5, 28), ("test_vit", None, 64)])
def test_networks_that_end_at_an_exit(name, width, size, tmp_path):
    # At 28 pixels the maps have 7 rows, of which four parts are not equal.
    net = zc.add_exits(timm.create_model(name, num_classes=10, pretrained_cfg_overlay={"input_size": (3, size, size)}), 2)
    short = net.export(1) if width is None else zc.slim(net, (width, 1.0)).export(width, exit=1)
    short = short.train()
    done = export.export_program(short, tmp_path / "model.pt2")
    assert done.difference <= export.TOLERANCE
    assert short.training
    program, images = torch.export.load(tmp_path / "model.pt2").module(), torch.randn(3, 3, size, size)
    assert torch.allclose(program(images), short.eval()(images), atol=1e-5)
    if width:
        assert export.export_onnx(short, tmp_path / "model.onnx").difference <= export.TOLERANCE


def test_program(model, tmp_path):
    done = export.export_program(model, tmp_path / "model.pt2", DataConfig(source="digits"))
    assert done.difference <= export.TOLERANCE
    program = torch.export.load(tmp_path / "model.pt2").module()
    images = torch.randn(5, *model.pretrained_cfg["input_size"])
    assert torch.allclose(program(images), model(images), atol=1e-5)


def test_every_module_keeps_its_mode(model):
    model = copy.deepcopy(model).train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    export.export_program(model)
    assert [module.training for module in model.modules()] == modes


def test_a_difference_is_an_error(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(CompressError, match="exported ones differ by"):
        export.export_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.pt2").write_text("an earlier one")
    with pytest.raises(CompressError, match="exported ones differ by"):
        export.export_program(model, tmp_path / "model.pt2")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]


def test_a_file_in_the_way_of_a_folder(model, tmp_path):
    (tmp_path / "file").write_text("")
    for write in (export.export_onnx, export.export_program):
        with pytest.raises(CompressError, match=r"file': expected a folder that can be written, found none and cannot make it"):
            write(model, tmp_path / "file/model")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where not even root can write")
@pytest.mark.parametrize(
    "write", [export.export_onnx, export.export_program, lambda _, path: pull(HALF, path)], ids=["onnx", "program", "pull"]
)
def test_a_folder_that_cannot_be_written(model, write):
    with pytest.raises(CompressError, match="/proc/there: expected a place in a folder that can be written"):
        write(model, Path("/proc/there"))


def test_the_extra_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompressError, match=r"pip install 'zoo_compress\[onnx\]'"):
        export.export_onnx(model, tmp_path / "model.onnx")


def test_models_that_cannot_be_exported():
    class Branch(torch.nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x  # which of them, only the numbers tell

    with pytest.raises(CompressError, match=r"Branch: torch\.export cannot export it"):
        export.export_program(Branch())


def test_images_are_those_of_the_data_source(model):
    images = export.comparison_images(model, DataConfig(source="digits"), 4)
    assert images.shape == (4, 1, 32, 32)
    assert len(images.unique()) > 10
    assert not torch.equal(images, export.comparison_images(model, None, 4))


def test_command(tmp_path):
    from click.testing import CliRunner

    from zoo_compress.cli import cli

    run = CliRunner().invoke(cli, ["export", HALF, "--program", str(tmp_path / "m.pt2")])
    assert run.exit_code == 0, run.output
    assert "outputs on 8 images of digits differ by" in run.output
    assert CliRunner().invoke(cli, ["export", HALF]).exit_code == 2


def test_every_width_and_exit(tmp_path):
    net = zc.slim(zc.add_exits(timm.create_model("test_resnet", num_classes=10, in_chans=1), 2), (0.5, 1.0)).eval()
    save(net, tmp_path / "net")
    sizes = {}
    for width, number in ((None, None), (0.5, None), (0.5, 1), (1.0, 0)):
        options = (("--width", width), ("--exit", number))
        given = [str(word) for option in options if option[1] is not None for word in option]
        run = CliRunner().invoke(cli, ["export", str(tmp_path / "net"), "--onnx", str(tmp_path / "m.onnx"), *given])
        assert run.exit_code == 0, run.output
        sizes[width, number] = (tmp_path / "m.onnx").stat().st_size
        part, images = export.part(net, width, number), torch.randn(2, 1, 160, 160)
        net.set_width(width or 1.0)
        with torch.no_grad():
            assert torch.equal(part(images), net(images) if number is None else net.infer(images, exit=number))
    assert sizes[None, None] > sizes[0.5, None] > sizes[0.5, 1]
    assert sizes[None, None] > sizes[1.0, 0]


def test_parts_that_are_not_there(model):
    with pytest.raises(CompressError, match=r"width: expected none, ResNet is not slimmable, found 0\.5"):
        export.part(model, width=0.5)
    with pytest.raises(CompressError, match="exit: expected none, ResNet has no early exits, found 1"):
        export.part(model, exit=1)
    with pytest.raises(CompressError, match="exit: expected 0 to 1, an early exit, found 2"):
        export.part(zc.add_exits(timm.create_model("test_resnet"), 2), exit=2)


@pytest.mark.parametrize("kind", ["published", "saved"])
def test_as_an_encoder_of_somebody_elses_network(kind, tmp_path):
    """segmentation_models_pytorch makes a U-Net around any backbone that timm's factory makes by name."""
    import segmentation_models_pytorch as segmentation

    if kind == "published":
        name, base, channels = HALF, "test_resnet", 1
    else:
        save(timm.create_model("test_efficientnet__pruned", keep=0.5), tmp_path)
        name, base, channels = f"local-dir:{tmp_path}", "test_efficientnet", 3
    unet = segmentation.Unet(f"tu-{name}", encoder_weights=True, in_channels=channels, classes=2)
    weights = timm.create_model(name, pretrained=True).state_dict()
    taken = {key.removeprefix("model."): value for key, value in unet.encoder.state_dict().items()}
    assert all(torch.equal(value, weights[key]) for key, value in taken.items())
    out = unet(torch.randn(2, channels, 64, 64))
    assert out.shape == (2, 2, 64, 64)
    out.square().mean().backward()
    grads = [parameter.grad for parameter in unet.encoder.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    dense = timm.create_model(base, features_only=True, in_chans=channels).feature_info.channels()
    assert all(now <= before for now, before in zip(unet.encoder.model.feature_info.channels(), dense, strict=True))
    assert sum(unet.encoder.model.feature_info.channels()) < sum(dense)


def test_int8_keeps_accuracy_and_is_an_ordinary_file(model, tmp_path):
    import onnxruntime

    data = DataConfig(source="digits")
    whole, small = export_int8(model, tmp_path / "small.onnx", data)
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    assert small.size == (tmp_path / "small.onnx").stat().st_size < 0.5 * whole.size
    record = next(v for v in zc.list_variants(HALF))
    assert whole.top1 == pytest.approx(record.top1, abs=1e-3), "the float file's accuracy is the card's"
    assert small.top1 > whole.top1 - 2
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    images = export.comparison_images(model, data)
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        expected = model(images).numpy()
    assert 0 < np.abs(found - expected).max() / np.abs(expected).max() < 0.2
    weights = [i for i in onnx.load(tmp_path / "small.onnx").graph.initializer if i.data_type == onnx.TensorProto.INT8]
    assert sum(np.prod(i.dims) for i in weights) > 0.9 * sum(p.numel() for p in model.parameters() if p.ndim > 1)


@pytest.mark.parametrize("batches", [0, -1, 1.5, True])
def test_int8_needs_batches(model, tmp_path, batches):
    with pytest.raises(CompressError, match=r"^batches: expected a positive number of training batches, found "):
        export_int8(model, tmp_path / "x.onnx", DataConfig(source="digits"), batches=batches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_precision_is_refused_at_once(tmp_path, dtype):
    small = timm.create_model("test_resnet", num_classes=10).to(dtype)
    said = f"expected a model in float32, found 'conv1.0.weight' in {str(dtype).removeprefix('torch.')}; export model.float()"
    for write in (export.export_onnx, export.export_program):
        with pytest.raises(CompressError, match=re.escape(said)):
            write(small, tmp_path / "x")


def test_what_the_exporter_cannot_do_is_said_by_its_cause(model, tmp_path, monkeypatch):
    """Its own error says, in colours, that it was step 2 of 3."""

    def fails(*args, **kwargs):
        raise RuntimeError("This is \x1b[96mstep 2/3\x1b[0m of exporting") from ValueError("Cannot view a tensor\nhere")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(CompressError, match=r"^ResNet: cannot be exported to ONNX: Cannot view a tensor$"):
        export.export_onnx(model, tmp_path / "x.onnx")


def test_int8_needs_images(tmp_path):
    small = zc.prune(timm.create_model("test_resnet", num_classes=10), keep=0.5)
    save(small, tmp_path / "m")
    result = CliRunner().invoke(cli, ["export", str(tmp_path / "m"), "--int8", str(tmp_path / "x.onnx")])
    assert result.exit_code != 0
    assert "export: expected --data beside --int8" in result.output
    assert not (tmp_path / "x.onnx").exists()

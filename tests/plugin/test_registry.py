"""Names behave as timm's own do."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.models import _builder, get_pretrained_cfg

import zoo_compress
from zoo_compress.errors import CompressError, VariantError
from zoo_compress.plugin import load, registry, save
from zoo_compress.plugin.builder import build
from zoo_compress.structure.variant import Variant
from zoo_compress.zoo import index

NAME = "test_resnet__pruned"


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_every_architecture_has_its_names():
    bases = timm.list_models(exclude_filters="*__*")
    assert len(bases) > 1000
    names = {name.partition(".")[0] for name in timm.list_models("*__*")}
    assert names == {f"{base}__{kind}" for base in bases for kind in registry.KINDS}


def test_names_claim_only_published_weights():
    published = {entry.name for entry in index.read().variants if entry.checkpoint or entry.hub_id}
    assert set(timm.list_models("*__*", pretrained=True)) == published
    for name in timm.list_models("*__pruned"):
        cfg, base = get_pretrained_cfg(name), get_pretrained_cfg(name.removesuffix("__pruned"))
        assert cfg.architecture == name
        assert not cfg.has_weights
        assert not cfg.custom_load
        assert (cfg.input_size, cfg.mean, cfg.classifier, cfg.first_conv) == (base.input_size, base.mean, base.classifier, base.first_conv)


def test_names_of_the_base_are_untouched():
    program = (
        "import timm; names = timm.list_models(); tags = timm.list_pretrained(); import zoo_compress; "
        "assert [n for n in timm.list_models() if '__' not in n] == names; "
        "assert [n for n in timm.list_pretrained() if '__' not in n] == tags"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", program], check=True)


@pytest.mark.parametrize("budget", [{"keep": 0.5}, {"macs": 0.5}, {"params": 0.5}])
def test_a_budget_makes_a_smaller_model(budget):
    base, model = timm.create_model("test_resnet"), timm.create_model(NAME, **budget)
    assert type(model) is type(base)
    assert parameters(model) < parameters(base)
    assert model.pretrained_cfg["architecture"] == NAME
    assert Variant.from_dict(model._model_args["variant"]).base == "test_resnet"
    model(torch.randn(2, *model.pretrained_cfg["input_size"])).sum().backward()


def test_sizes_do_not_depend_on_random_weights():
    records = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        records.append(timm.create_model(NAME, keep=0.5)._model_args["variant"])
    assert records[0] == records[1]


def test_tuples_among_the_arguments_are_what_files_make_of_them(tmp_path, images):
    model = timm.create_model("test_resnet", layers=(1, 1, 2, 1), channels=(32, 48, 48, 96))
    small = zoo_compress.prune(model, keep=0.7).eval()
    save(small, tmp_path)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), small(images))


def test_pruning_again_records_against_the_base(tmp_path, images):
    once = timm.create_model(NAME, keep=0.8, num_classes=11, act_layer="silu", drop_rate=0.2)
    twice = zoo_compress.prune(once, keep=0.7).eval()
    variant = Variant.from_dict(twice._model_args["variant"])
    assert variant.base == "test_resnet"
    assert variant.base_args == {"act_layer": "silu"}
    assert parameters(twice) < parameters(once)
    save(twice, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), twice(images))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({}, ["expected one of keep=, macs=, params=, latency=", "variant="]),
        ({"pretrained": True}, ["expected one of keep=, macs=, params=, latency="]),
        ({"keep": 0.5, "macs": 0.5}, ["exactly one"]),
        ({"keep": -1}, ["keep", "-1"]),
        ({"keep": 0.5, "no_such_argument": 1}, ["no_such_argument"]),
        ({"keep": 0.5, "pretrained": True, "base_tag": "nope"}, ["test_resnet", "nope"]),
        ({"variant": 3}, ["variant", "expected a dict, found int"]),
        ({"pretrained_cfg": "half", "keep": 0.5}, [NAME, "no published checkpoint 'half'"]),
    ],
)
def test_bad_arguments(kwargs, said):
    with pytest.raises(CompressError) as caught:
        timm.create_model(NAME, **kwargs)
    for part in said:
        assert part in str(caught.value)


def test_unknown_tag():
    with pytest.raises(CompressError, match="no published checkpoint 'half'"):
        timm.create_model(f"{NAME}.half", pretrained=True)


def test_base_without_pretrained_weights_is_named():
    base = next(name for name in timm.list_models(exclude_filters="*__*") if not get_pretrained_cfg(name).has_weights)
    with pytest.raises(CompressError, match=rf"^{base}: timm has no pretrained weights"):
        timm.create_model(f"{base}__pruned", pretrained=True, keep=0.5)


def test_pretrained_prunes_the_weights_of_the_base(tmp_path, caplog):
    torch.manual_seed(3)
    base = timm.create_model("test_resnet")
    save(base, tmp_path)
    overlay = {"file": str(tmp_path / "model.safetensors")}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, macs=0.5)
    assert "not fine-tuned" in caplog.text
    expected = zoo_compress.prune(base, macs=0.5).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not any(model.pretrained_cfg.get(key) for key in ("file", "url", "hf_hub_id"))


def test_a_record_of_another_architecture():
    stored = timm.create_model(NAME, keep=0.5)._model_args["variant"]
    with pytest.raises(VariantError, match=r"expected 'resnet18' .* found a record of test_resnet__pruned"):
        timm.create_model("resnet18__pruned", variant=stored)


# The four ways timm's models make features: rebuilt list, hooks, getter, and classes of their own.
FEATURES = ["test_resnet", "test_vit", "test_efficientnet", "test_mambaout", "test_byobnet"]


@pytest.mark.parametrize("base", FEATURES)
@pytest.mark.parametrize("options", [{}, {"out_indices": (1, 2)}, {"feature_cls": "getter"}, {"out_indices": [-1]}], ids=str)
def test_features_are_the_bases_own(base, options, tmp_path):
    reference = timm.create_model(base, features_only=True, **options)
    save(timm.create_model(f"{base}__pruned", keep=0.5), tmp_path)
    model = load(tmp_path, features_only=True, **options).eval()
    assert type(model) is type(reference)
    assert vars(model).keys() >= vars(reference).keys() - {"_model_args"}
    x = torch.randn(1, *reference.pretrained_cfg["input_size"])
    with torch.no_grad():
        outs = model(x)
        shapes = [out.shape for out in reference(x)]
    assert model.feature_info.reduction() == reference.feature_info.reduction()
    assert len(outs) == len(shapes)
    for out, shape, channels, full in zip(outs, shapes, model.feature_info.channels(), reference.feature_info.channels(), strict=True):
        axis = list(shape).index(full, 1)
        assert out.shape[axis] == channels < full
        assert out.shape[:axis] == shape[:axis]
        assert out.shape[axis + 1 :] == shape[axis + 1 :]


def test_features_of_a_budget_are_those_of_the_model():
    torch.manual_seed(0)
    model = timm.create_model(NAME, keep=0.5, features_only=True, out_indices=(2, 4)).eval()
    outs = model(torch.randn(1, *model.pretrained_cfg["input_size"]))
    assert [out.shape[1] for out in outs] == model.feature_info.channels()


def test_the_step_into_timm_is_undone():
    original = _builder.load_pretrained
    seen = []
    cfg = get_pretrained_cfg(NAME)
    build(timm.models.model_entrypoint("test_resnet"), cfg, lambda built: seen.append(built.num_classes))
    assert seen == [cfg.num_classes]
    assert _builder.load_pretrained is original

    def fail(built):
        raise KeyError("x")

    with pytest.raises(KeyError):
        build(timm.models.model_entrypoint("test_resnet"), cfg, fail)
    assert _builder.load_pretrained is original


def test_an_entrypoint_past_timms_builder_is_refused():
    with pytest.raises(CompressError, match="loads weights 0 times"):
        build(lambda **kwargs: torch.nn.Identity(), get_pretrained_cfg(NAME), lambda built: None)

"""Classifiers of compressed models: taken away, made anew, asked for with another pooling."""

import pytest
import timm
import torch

import zoo_compress as zc

NAMES = ("test_resnet", "test_vit", "test_convnext")


@pytest.fixture
def image():
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def stored(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def reloads(model, folder, image):
    zc.save(model, folder)
    with torch.no_grad():
        return torch.equal(stored(folder)(image), model.eval()(image))


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_pruned_without_classes_gets_a_classifier(name, tmp_path, image):
    small = zc.prune(timm.create_model(name, num_classes=0), macs=0.7)
    zc.save(small, tmp_path / "a")
    model = stored(tmp_path / "a", num_classes=5)
    assert model(image).shape == (2, 5)
    assert torch.equal(model.forward_head(model.forward_features(image), pre_logits=True), small.eval()(image))
    assert reloads(model, tmp_path / "b", image)
    assert stored(tmp_path / "b", num_classes=0)(image).shape == small(image).shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["asked", "reset"])
def test_what_lost_its_classifier_is_saved_pruned_and_gets_another(name, how, tmp_path, image):
    small = zc.prune(timm.create_model(name, num_classes=10), macs=0.7)
    zc.save(small, tmp_path / "a")
    model = stored(tmp_path / "a", num_classes=0) if how == "asked" else small
    if how == "reset":
        model.reset_classifier(0)
    assert reloads(model, tmp_path / "b", image)
    assert stored(tmp_path / "b", num_classes=7)(image).shape == (2, 7)
    assert reloads(zc.prune(model, macs=0.8), tmp_path / "c", image)
    assert reloads(zc.sparsify(model, density=0.5), tmp_path / "d", image)


def test_another_pooling_makes_a_classifier_that_fits_it(tmp_path, image):
    small = zc.prune(timm.create_model("test_resnet", num_classes=10), macs=0.7)
    zc.save(small, tmp_path / "a")
    model = stored(tmp_path / "a", global_pool="catavgmax", num_classes=5)
    assert model(image).shape == (2, 5)
    assert model.fc.in_features == 2 * small.fc.in_features
    assert reloads(model, tmp_path / "b", image)
    with pytest.raises(zc.VariantError, match=r"'fc.weight': expected \(10, "):  # ten classes, whose weights do not fit
        stored(tmp_path / "a", global_pool="catavgmax")
    for pooling in ("avg", "max"):  # of as many features: the classifier stays
        assert torch.equal(stored(tmp_path / "a", global_pool=pooling).fc.weight, small.fc.weight)


def test_a_slimmable_network_gets_a_classifier_for_all_widths_when_it_is_loaded(tmp_path, image):
    net = zc.slim(timm.create_model("test_resnet", num_classes=10), widths=(0.5, 1.0)).eval()
    net.set_width(0.5)
    before = net(image)
    with pytest.raises(zc.CompressError, match=r"reset_classifier\(5\) would leave the widths without their classifier"):
        net.reset_classifier(5)
    assert torch.equal(net(image), before)
    zc.save(net, tmp_path / "a")
    other = stored(tmp_path / "a", num_classes=5)
    for width in (0.5, 1.0):
        other.set_width(width)
        assert other(image).shape == (2, 5)
        assert torch.equal(other.export(width).eval()(image), other(image))
    assert reloads(other, tmp_path / "b", image)


@pytest.mark.parametrize("name", NAMES)
def test_a_narrower_backbone_without_classes_knows_what_a_new_classifier_will_read(name, tmp_path, image):
    small = zc.prune(timm.create_model(name, num_classes=0), keep=0.5).eval()
    zc.save(small, tmp_path)
    features = small(image)
    assert small.head_hidden_size == features.shape[1] < timm.create_model(name).head_hidden_size
    assert stored(tmp_path, num_classes=5)(image).shape == (2, 5)
    small.reset_classifier(5)
    assert small(image).shape == (2, 5)


@pytest.mark.parametrize("classes", [0, 5])
def test_a_classifier_that_is_a_convolution_reads_as_many_features_as_there_are(classes, image):
    model = timm.create_model("resnetv2_18", num_classes=classes, channels=(16, 16, 16, 32))
    small = zc.prune(model, keep=0.5).eval()
    assert small.head_hidden_size == small.num_features < 32
    small.reset_classifier(7)
    assert small(image).shape == (2, 7)

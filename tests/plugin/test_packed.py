"""Packed checkpoints: the file shrinks as arithmetic says, plain timm reloads it to the bit, and what is damaged is refused."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import zoo_compress as zc
from zoo_compress.errors import CompressError, VariantError
from zoo_compress.plugin.weights import DIGEST
from zoo_compress.surgery.masks import density, masks_of, remaining
from zoo_compress.surgery.packing import as_integers

CREATED = {
    "sparse": ("test_resnet__sparse", {"density": 0.1}),
    "clustered": ("test_resnet__clustered", {"bits": 3}),
    "binary": ("test_resnet__binary", {}),
    "ternary": ("test_resnet__ternary", {"exclude": ["fc.weight"]}),
}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(as_integers(value), as_integers(b[name])) if value.is_floating_point() else torch.equal(value, b[name])
        for name, value in a.items()
    )


@pytest.fixture(scope="module")
def sparse():
    torch.manual_seed(0)
    return timm.create_model("test_resnet__sparse", density=0.1, num_classes=10).eval()


@pytest.fixture
def folder(sparse, tmp_path):
    zc.save(sparse, tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "arguments"), CREATED.values(), ids=CREATED)
def test_reloads_to_the_bit_by_plain_timm(name, arguments, tmp_path):
    model = timm.create_model(name, num_classes=10, **arguments)
    zc.save(model, tmp_path / "a")
    again = timm.create_model(f"local-dir:{tmp_path}/a", pretrained=True)
    assert same(again, model)
    assert type(again) is type(timm.create_model("test_resnet"))
    zc.save(again, tmp_path / "b")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_from_the_hub(sparse, hub):
    zc.push_to_hub(sparse, "me/sparse")
    assert same(timm.create_model("hf-hub:me/sparse", pretrained=True), sparse)


def test_a_sparse_file_holds_bits_and_values(sparse, folder):
    masks, state = masks_of(sparse), sparse.state_dict()
    rest = sum(value.nbytes for name, value in state.items() if name not in masks)
    bits = sum(-(-mask.numel() // 8) for mask in masks.values())
    size = (folder / "model.safetensors").stat().st_size
    header = 150 * (len(state) + 2 * len(masks))
    # A tenth of the weights: the entropy of their places is 0.47 bits each.
    assert rest + 4 * remaining(masks) + 0.46 * bits < size < rest + 4 * remaining(masks) + 0.55 * bits + header
    assert size < 0.25 * sum(value.nbytes for value in state.values())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_clustered_file_takes_its_bits(bits, tmp_path):
    model = timm.create_model("test_resnet", num_classes=10)
    zc.save(zc.cluster(model, bits=bits), tmp_path)
    weights = masks_of(model)
    rest = sum(value.nbytes for name, value in model.state_dict().items() if name not in weights)
    promised = sum(-(-w.numel() * bits // 8) + 4 * min(w.numel(), 2**bits) for w in weights.values())
    header = 150 * (len(model.state_dict()) + 3 * len(weights))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < rest + promised + header
    # Huffman's code takes less, but evenly spaced clusters of random weights are used about evenly.
    assert size > rest + 0.6 * promised


def test_pruned_sparse_and_clustered(tmp_path):
    small = zc.cluster(zc.sparsify(zc.prune(timm.create_model("test_resnet", num_classes=10), macs=0.5), density=0.3), bits=3)
    zc.save(small, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same(again, small)
    assert small.pretrained_cfg["architecture"] == "test_resnet__clustered"
    assert small._model_args["variant"]["packed"]["fc.weight"] == {"mask": True, "bits": 3}
    assert density(masks_of(again)) == pytest.approx(0.3, abs=1e-3)
    wide = zc.load(tmp_path, num_classes=37)
    assert len(wide.fc.weight.unique()) > 100, "a new head is free"
    zc.save(wide, tmp_path / "wide")
    assert same(zc.load(tmp_path / "wide"), wide)


def test_by_timms_own_saving(sparse, tmp_path):
    timm.models.save_for_hf(sparse, tmp_path, safe_serialization=True)
    assert same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), sparse)


def test_other_precision(sparse, tmp_path):
    import copy

    half = copy.deepcopy(sparse).to(torch.bfloat16)
    zc.save(half, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["fc.weight.values"].dtype == torch.bfloat16
    assert torch.equal(zc.load(tmp_path).fc.weight, half.fc.weight.float())


def test_of_a_pruned_network_and_pruned_afterwards(tmp_path):
    small = zc.prune(timm.create_model("test_resnet", num_classes=10), macs=0.5)
    sparse = zc.sparsify(small, density=0.2)
    zc.save(sparse, tmp_path / "a")
    assert sparse.pretrained_cfg["architecture"] == "test_resnet__sparse"
    assert same(zc.load(tmp_path / "a"), sparse)
    smaller = zc.prune(sparse, macs=0.7)
    zc.save(smaller, tmp_path / "b")
    assert smaller.pretrained_cfg["architecture"] == "test_resnet__pruned"
    assert (tmp_path / "b" / "model.safetensors").stat().st_size < (tmp_path / "a" / "model.safetensors").stat().st_size
    again = zc.load(tmp_path / "b")
    assert same(again, smaller)
    assert density(masks_of(again)) < 0.5
    filled = zc.prune(sparse, macs=0.7, reconstruct=[torch.randn(8, 3, 64, 64)])
    assert "packed" not in filled._model_args["variant"], "least squares gave values to all of them"


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_of_a_factorised_network_and_factorised_afterwards(pruned, tmp_path):
    net = timm.create_model("test_resnet", num_classes=10)
    net = zc.prune(net, macs=0.7) if pruned else net
    low = zc.sparsify(zc.factorize(net, macs=0.7), density=0.2)
    after = zc.factorize(zc.sparsify(net, density=0.2, exclude=("layer4.*",)), macs=0.94)
    assert all(path.startswith("layer4.") for path in after._model_args["variant"]["factors"]), "removed weights are not lost"
    for i, model in enumerate((low, after)):
        zc.save(model, tmp_path / str(i))
        assert same(zc.load(tmp_path / str(i)), model)
    assert density(masks_of(low)) == pytest.approx(0.2, abs=1e-3)
    factors = after._model_args["variant"]["factors"]
    kept = after._model_args["variant"]["packed"]
    assert kept, "what is no factor is still sparse"
    assert not any(name.removesuffix(".weight") in factors for name in kept)


def test_with_exits(tmp_path):
    net = zc.sparsify(zc.add_exits(timm.create_model("test_resnet", num_classes=10), 2), density=0.2)
    zc.save(net, tmp_path)
    assert same(zc.load(tmp_path), net)
    assert any(name.startswith("exits.") for name in masks_of(net))
    short = net.export(exit=0)
    zc.save(short, tmp_path / "short")
    assert same(zc.load(tmp_path / "short"), short)


class TestAsTimmUsersExpect:
    def test_other_classes(self, folder, sparse):
        again = zc.load(folder, num_classes=7)
        masks = masks_of(again)
        assert masks.pop("fc.weight").all(), "a new head is whole"
        assert all(torch.equal(mask, masks_of(sparse)[name]) for name, mask in masks.items())

    def test_no_classes_and_features(self, folder, sparse):
        image = torch.randn(1, 3, 64, 64)
        assert torch.equal(zc.load(folder, num_classes=0).eval().forward_features(image), sparse.forward_features(image))
        features = zc.load(folder, features_only=True).eval()(image)
        assert torch.equal(features[-1], sparse.forward_features(image))

    def test_other_channels(self, folder, sparse):
        again = zc.load(folder, in_chans=1)
        assert torch.equal(again.layer1[0].conv1.weight, sparse.layer1[0].conv1.weight)

    def test_random_weights_are_whole(self, folder):
        again = zc.load(folder, pretrained=False)
        assert all(mask.all() for mask in masks_of(again).values())

    def test_features_on_the_spot(self):
        net = timm.create_model("test_resnet__sparse", density=0.1, features_only=True)
        assert len(net(torch.randn(1, 3, 64, 64))) > 1

    @pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_efficientnet", "test_resnet"])
    def test_a_backbone_keeps_its_zeros(self, name, tmp_path):
        zc.save(timm.create_model(f"{name}__sparse", density=0.3), tmp_path)
        for net in (zc.load(tmp_path, features_only=True), timm.create_model(f"{name}__sparse", density=0.3, features_only=True)):
            before = masks_of(net)
            assert density(before) == pytest.approx(0.3, abs=0.05)
            optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
            keeper = zc.keep_packed(net, optimizer)
            assert keeper.masks.keys() == before.keys()
            images = torch.randn(2, *net.pretrained_cfg["input_size"])
            sum(features.square().mean() for features in net(images)).backward()
            optimizer.step()
            assert all(torch.equal(mask, before[weight]) for weight, mask in masks_of(net).items())

    def test_pretrained_needs_weights(self):
        with pytest.raises(CompressError, match="resnet18__sparse: expected one of density="):
            timm.create_model("resnet18__sparse")
        with pytest.raises(CompressError, match="test_resnet__clustered: expected one of bits="):
            timm.create_model("test_resnet__clustered")
        with pytest.raises(CompressError, match=r"found macs="):
            timm.create_model("test_resnet__sparse", macs=0.5)


def damage(folder, change=None, record=None):
    """Edit the weights or the record, as somebody does who knows the format."""
    path = folder / "model.safetensors"
    state = load_file(path)
    if change:
        change(state)
    save_file(state, path)
    config = json.loads((folder / "config.json").read_text())
    config.pop(DIGEST)
    if record:
        record(config["model_args"]["variant"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: s.update({"fc.weight.mask_coded": s["fc.weight.mask_coded"][:-1]}),
            r"tensor 'fc\.weight'\.mask_coded: expected 120 bytes",
        ),
        (lambda s: s.update({"fc.weight.values": s["fc.weight.values"][:-1]}), r"tensor 'fc\.weight'\.values: expected the 96 that"),
        (lambda s: s.pop("fc.weight.mask_coded"), r"tensor 'fc\.weight'\.mask: expected a mask or a codebook, found only shape, values"),
        (
            lambda s: [s.pop(f"fc.weight.{part}") for part in ("mask_coded", "shape", "values")],
            r"tensor 'fc\.weight': expected .*found none",
        ),
        (lambda s: s.update({"fc.weight.shape": torch.tensor([96, 10])}), r"tensor 'fc\.weight\.?.*': expected the 10 classes"),
        (lambda s: s.update({"conv1.3.weight.shape": torch.tensor([9, 16, 16])}), r"tensor 'conv1\.3\.weight': expected \(16, 16, 3, 3\)"),
        (
            lambda s: s.update({"conv1.3.weight.shape": torch.tensor([2**31 - 1] * 4)}),
            r"'conv1\.3\.weight'\.shape: expected at most \d+ elements",
        ),
        (lambda s: s.update({"bn1.weight.mask": torch.ones(1, dtype=torch.uint8)}), r"'bn1\.weight\.mask': expected none of that name"),
        (lambda s: s.update({"fc.weight": torch.zeros(10, 96)}), r"'fc\.weight\.(mask_coded|shape|values)': expected none of that name"),
    ],
)
def test_a_corrupted_packed_file(folder, change, said):
    damage(folder, change)
    for create in (lambda: zc.load(folder), lambda: timm.create_model(f"local-dir:{folder}", pretrained=True)):
        with pytest.raises(VariantError, match=said):
            create()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer9.weight": {"mask": True}}, r"variant\.packed\['layer9\.weight'\]: test_resnet has no such parameter"),
        ({"bn1.running_mean": {"mask": True}}, r"variant\.packed\['bn1\.running_mean'\]: test_resnet has no such parameter"),
        ({"fc.weight": {}}, r"variant\.packed\.fc\.weight: expected a mask, bits or both, found neither"),
        ({"fc.weight": {"bits": 9}}, r"variant\.packed\.fc\.weight\.bits: .*8, found 9"),
        ({"fc.weight": {"mask": 1}}, r"variant\.packed\.fc\.weight\.mask: .*found 1"),
        ({"fc.weight": {"mask": True, "run": "x"}}, r"variant\.packed\.fc\.weight\.run: extra"),
    ],
)
def test_records(folder, change, said):
    damage(folder, record=lambda variant: variant["packed"].update(change))
    with pytest.raises(VariantError, match=said):
        zc.load(folder)


def test_a_bit_flipped_in_the_file(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VariantError, match="sha256"):
        zc.load(folder)


@pytest.fixture(scope="module")
def coat():
    torch.manual_seed(0)
    return timm.create_model("coat_tiny", num_classes=10, img_size=64).eval()


@pytest.fixture(scope="module")
def sparse_coat(coat):
    return zc.sparsify(coat, density=0.1)


class TestTied:
    """coat uses the same layers under several names."""

    def test_are_stored_once(self, sparse_coat, tmp_path):
        zc.save(sparse_coat, tmp_path)
        names, params = set(sparse_coat.state_dict()), dict(sparse_coat.named_parameters())
        tied = json.loads((tmp_path / "config.json").read_text())["tied_weights"]
        assert tied.keys() == {name for name, _ in sparse_coat.named_parameters(remove_duplicate=False)} - params.keys()
        assert set(tied.values()) <= names - tied.keys()
        size = (tmp_path / "model.safetensors").stat().st_size
        assert size < 0.25 * 4 * sum(param.numel() for param in params.values())
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert same(again, sparse_coat)
        assert len(list(again.parameters())) == len(params), "they are tied again"

    def test_of_a_pruned_model_as_features_and_with_other_classes(self, coat, tmp_path):
        small = zc.prune(coat, macs=0.7).eval()
        zc.save(small, tmp_path)
        assert (tmp_path / "model.safetensors").stat().st_size < 4.2 * sum(param.numel() for param in small.parameters())
        image = torch.randn(1, 3, 64, 64)
        assert torch.equal(zc.load(tmp_path).eval()(image), small(image))
        wide = zc.load(tmp_path, num_classes=3).eval()
        assert torch.equal(wide.forward_features(image)[-1], small.forward_features(image)[-1])

    def test_by_hand(self, tmp_path):
        """Tied after timm made the model: the base has two tensors, which get equal values."""
        model = zc.sparsify(timm.create_model("test_resnet", num_classes=10), density=0.5)
        model.layer1[0].bn2.weight = model.layer1[0].bn1.weight
        zc.save(model, tmp_path)
        assert same(zc.load(tmp_path), model)

    @pytest.mark.parametrize("said", ["x", {"a": 1}, ["a"], 3])
    def test_what_is_no_such_list(self, sparse_coat, said, tmp_path):
        zc.save(sparse_coat, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "tied_weights": said}))
        with pytest.raises(VariantError, match="tied_weights: expected names"):
            zc.load(tmp_path)

    def test_a_name_of_nothing(self, sparse_coat, tmp_path):
        zc.save(sparse_coat, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        name = next(iter(config["tied_weights"]))
        config["tied_weights"][name] = "nothing"
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(VariantError, match=f"{name}'.*found none"):
            zc.load(tmp_path)

    def test_of_an_ordinary_model_every_name_has_its_own(self, coat, tmp_path):
        zc.save(coat, tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == coat.state_dict().keys()

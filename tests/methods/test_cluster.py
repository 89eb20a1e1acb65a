"""Shared weights: k-means as everybody computes it, few values in every layer, and what cannot be clustered."""

import re
from functools import partial

import numpy as np
import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.cluster import ClusterConfig
from zoo_compress.surgery.kmeans import kmeans, nearest
from zoo_compress.surgery.masks import density, masks_of
from zoo_compress.surgery.weights import layer_weights


class TestKMeans:
    @pytest.mark.parametrize("clusters", [2, 7, 16, 256])
    @pytest.mark.parametrize("kind", ["normal", "uniform", "heavy"])
    def test_equals_scikit_learns(self, clusters, kind):
        sklearn = pytest.importorskip("sklearn.cluster")
        draw = np.random.default_rng(0)
        values = {"normal": draw.normal, "uniform": draw.uniform, "heavy": lambda size: draw.standard_t(2, size)}[kind](size=4000)
        start = np.linspace(values.min(), values.max(), clusters)
        reference = sklearn.KMeans(clusters, init=start[:, None], n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(values[:, None])
        found = kmeans(values, clusters)
        ours = ((values - found[nearest(values, found)]) ** 2).sum()
        # scikit-learn gives a cluster without members the farthest value; without such ones both do the same.
        used = len(np.unique(nearest(values, start))) == clusters
        if used:
            assert np.allclose(np.sort(reference.cluster_centers_[:, 0]), found, atol=1e-8)
        assert ours < 1.2 * reference.inertia_ or not used

    def test_finds_values_that_are_few(self):
        values = np.repeat([-1.0, 0.25, 3.0], [5, 1, 100])
        assert np.array_equal(kmeans(values, 3), [-1, 0.25, 3])
        assert np.array_equal(kmeans(np.full(9, 2.0), 1), [2])

    def test_every_value_goes_to_the_nearest(self):
        values = np.random.default_rng(1).normal(size=500)
        centroids = kmeans(values, 5)
        assert np.array_equal(nearest(values, centroids), np.abs(values[:, None] - centroids).argmin(1))

    def test_is_no_worse_than_even_spacing(self):
        values = np.random.default_rng(2).normal(size=5000)
        errors = [((values - c[nearest(values, c)]) ** 2).sum() for c in (np.linspace(values.min(), values.max(), 16), kmeans(values, 16))]
        assert errors[1] < 0.5 * errors[0]


class TestCluster:
    @pytest.mark.parametrize("bits", [1, 4, 8])
    def test_few_values_in_every_layer(self, model, bits):
        small = zc.cluster(model, bits=bits)
        for name in layer_weights(model):
            before, after = model.get_parameter(name), small.get_parameter(name)
            assert len(after.unique()) <= 2**bits
            assert (after - before).abs().mean() < (before - before.mean()).abs().mean()
        others = model.state_dict().keys() - layer_weights(model).keys()
        assert all(torch.equal(small.state_dict()[name], model.state_dict()[name]) for name in others)
        assert small.pretrained_cfg["architecture"] == "test_resnet__clustered"

    def test_more_bits_are_nearer(self, model):
        errors = []
        for bits in (1, 2, 4, 6):
            small = zc.cluster(model, bits=bits)
            errors.append(sum(float((small.get_parameter(n) - w).detach().square().sum()) for n, w in layer_weights(model).items()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.01 * errors[0]

    def test_only_the_weights_left_are_clustered(self, model):
        sparse = zc.sparsify(model, density=0.3)
        small = zc.cluster(sparse, bits=3)
        assert all(torch.equal(mask, masks_of(sparse)[name]) for name, mask in masks_of(small).items())
        for name, mask in masks_of(small).items():
            assert len(small.get_parameter(name)[mask].unique()) <= 8
        again = zc.sparsify(small, density=0.1)
        assert density(masks_of(again)) == pytest.approx(0.1, abs=1e-3)
        assert again._model_args["variant"]["packed"]["fc.weight"] == {"mask": True, "bits": 3}

    def test_layers_removed_whole(self, model):
        sparse = zc.sparsify(model, density=0.5)
        with torch.no_grad():
            sparse.layer1[0].conv1.weight.zero_()
        packed = zc.cluster(sparse, bits=3)._model_args["variant"]["packed"]
        assert packed["layer1.0.conv1.weight"] == {"mask": True, "bits": None}
        assert packed["fc.weight"] == {"mask": True, "bits": 3}

    def test_bits_by_pattern(self, model):
        small = zc.cluster(model, bits={"fc.*": 5, "layer*": 2})
        packed = small._model_args["variant"]["packed"]
        assert packed["fc.weight"] == {"mask": False, "bits": 5}
        assert packed["layer1.0.conv1.weight"]["bits"] == 2
        assert torch.equal(small.conv1[0].weight, model.conv1[0].weight)
        assert zc.cluster(model, bits={"fc.*": 5, "*": 2})._model_args["variant"]["packed"]["fc.weight"]["bits"] == 5

    def test_the_original_stays(self, model):
        before = [p.clone() for p in model.parameters()]
        zc.cluster(model, bits=2)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    @pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "4", None, {"fc.*": 0}])
    def test_bits_out_of_range(self, model, bits):
        with pytest.raises(CompressError, match="bits: expected 1 to 8"):
            zc.cluster(model, bits=bits)

    @pytest.mark.parametrize(
        ("bits", "said"),
        [
            ({}, "bits: expected at least one pattern of parameter names, found none"),
            ({5: 4}, "bits: expected patterns of parameter names such as 'fc.*', found 5"),
        ],
    )
    def test_bits_for_nothing(self, model, bits, said):
        with pytest.raises(CompressError, match=f"^{re.escape(said)}$"):
            zc.cluster(model, bits=bits)
        with pytest.raises(CompressError, match=r"^ClusterConfig: bits"):
            ClusterConfig(bits=bits)

    @pytest.mark.parametrize("exclude", [5, None, [5]])
    def test_patterns_that_are_none(self, model, exclude):
        with pytest.raises(CompressError, match=r"^exclude: expected patterns of parameter names such as 'fc\.\*', found"):
            zc.cluster(model, exclude=exclude)

    def test_one_pattern_as_it_is(self, model):
        assert all(
            "fc.weight" not in change(model, exclude="fc.*")._model_args["variant"]["packed"]
            for change in (zc.cluster, zc.quantize, partial(zc.sparsify, density=0.5))
        )

    def test_other_bad_input(self, model):
        with pytest.raises(CompressError, match="'nothing' matches none"):
            zc.cluster(model, bits={"nothing": 3})
        with pytest.raises(CompressError, match="'nothing' matches none"):
            zc.cluster(model, exclude=["nothing"])
        few = zc.cluster(model, bits=2, exclude=["layer*"])
        with pytest.raises(
            CompressError, match=r"cluster: '.*': expected at least the 16 values of 4 bits, found 4; exclude it, or take fewer"
        ):
            zc.cluster(few, bits=4)
        net = timm.create_model("test_resnet")
        with torch.no_grad():
            net.fc.weight[0, 0] = float("inf")
        with pytest.raises(CompressError, match=r"'fc\.weight': expected finite weights"):
            zc.cluster(net)

    def test_of_the_few_weights_that_sparsifying_left_each_keeps_its_value(self, tmp_path):
        net = timm.create_model("test_resnet", num_classes=10)
        with torch.no_grad():
            net.layer2[0].conv1.weight[0, 1:] = 1e-9
            net.layer2[0].conv1.weight[1:] = 1e-9
            net.layer2[0].conv1.weight[0, 0] = torch.arange(9.0).reshape(3, 3) - 4
        sparse = zc.sparsify(net, density=0.1)
        left = sparse.layer2[0].conv1.weight.detach().clone()
        assert len(left.unique()) == 9, "eight values and zero"
        few = zc.cluster(sparse, bits=4)
        assert torch.equal(few.layer2[0].conv1.weight, left)
        assert 9 < len(few.layer3[0].conv1.weight.unique()) <= 17
        zc.save(few, tmp_path)
        assert torch.equal(zc.load(tmp_path).layer2[0].conv1.weight, left)

    def test_other_models(self):
        for name in ("test_vit", "test_convnext"):
            net = timm.create_model(name, num_classes=10)
            assert all(len(p.unique()) <= 16 for p in layer_weights(zc.cluster(net, bits=4)).values())

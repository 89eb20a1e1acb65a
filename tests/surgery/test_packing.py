"""Packed weights: equal to the bit, as small as arithmetic says, and refused when they do not fit."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo_compress.errors import VariantError
from zoo_compress.structure.packed import Packing
from zoo_compress.surgery import packing as packing_module
from zoo_compress.surgery.packing import as_integers, assignments, pack, pack_state, unpack, unpack_state

BOTH = Packing(mask=True, bits=8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_integers(a), as_integers(b))


def sparse(*shape, density=0.2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) < density, weight, torch.zeros_like(weight))


def clustered(*shape, bits, density=1.0):
    weight = torch.randint(1, 2**bits + 1, shape, generator=torch.Generator().manual_seed(1)) / 7
    return torch.where(sparse(*shape, density=density) != 0, weight, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_sparse_tensor_takes_a_bit_an_element_and_its_values(dtype):
    weight = sparse(37, 41, 3, dtype=dtype)
    parts = pack(weight, Packing(mask=True))
    entropy = -0.2 * math.log2(0.2) - 0.8 * math.log2(0.8)
    assert 0.98 * entropy < 8 * parts["mask_coded"].nbytes / weight.numel() < 1.2 * entropy
    assert len(parts["values"]) == int((weight != 0).sum())
    assert same(unpack(parts, Packing(mask=True), ""), weight)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_a_clustered_tensor_takes_its_bits(bits, density):
    weight = clustered(64, 50, 3, bits=bits, density=density)
    packing = Packing(mask=density < 1, bits=bits)
    parts = pack(weight, packing)
    kept = int((weight != 0).sum())
    # Above about half, an index for zero too is smaller than a mask.
    ways = {64 * 50 * 3 / 8 + kept * bits / 8, 64 * 50 * 3 * (2**bits).bit_length() / 8, 64 * 50 * 3 * bits / 8}
    taken = sum(part.nbytes for name, part in parts.items() if name.startswith(("mask", "indices")))
    assert taken <= min(ways) + 2
    assert density < 1 or bits == 8 or taken >= 0.97 * min(ways), "evenly used values leave nothing to a code"
    assert len(parts["codebook"]) <= 2**bits + 1
    assert same(unpack(parts, packing, ""), weight)


def test_ternary_takes_a_mask_and_a_sign():
    weight = clustered(100, 100, bits=1, density=0.3) - 1.5 / 7
    weight = torch.where(weight < -1 / 7, 0.0, weight)  # {-a, 0, a}
    parts = pack(weight, Packing(mask=True, bits=1))
    signs, mask = parts["indices"].nbytes, parts["mask_coded"].nbytes
    assert signs == -(-int((weight != 0).sum()) // 8)
    assert mask < weight.numel() / 8
    assert same(unpack(parts, Packing(mask=True, bits=1), ""), weight)


@given(st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.25, float("inf"), 1e-45]), min_size=1, max_size=700), st.booleans(), st.booleans())
def test_every_value_comes_back(values, mask, coded):
    weight = torch.tensor(values)
    packing = Packing(mask=mask or not coded, bits=8 if coded else None)
    parts = pack(weight.repeat(40), packing)
    if parts is not None:
        assert same(unpack(parts, packing, ""), weight.repeat(40))


def test_nan_and_minus_zero_are_values():
    weight = sparse(40, 40)
    weight[0, :3] = torch.tensor([float("nan"), -0.0, float("-inf")])
    for packing in (Packing(mask=True), BOTH):
        parts = pack(weight, packing)
        assert parts is not None
        assert same(unpack(parts, packing, ""), weight)


def test_more_elements_than_are_packed_at_a_time():
    weight = clustered(2**20 + 77, bits=3)
    assert same(unpack(pack(weight, Packing(bits=3)), Packing(bits=3), ""), weight)


def test_what_would_not_shrink_stays():
    assert pack(torch.randn(64, 64), Packing(mask=True)) is None
    assert pack(torch.randn(64, 64), Packing(bits=4)) is None
    assert pack(sparse(4), Packing(mask=True)) is None, "names take more than four numbers"


@pytest.mark.parametrize("mask", [False, True])
def test_more_values_than_the_record_says_have_no_codebook(mask):
    """As where heads that share values were scaled one by one: fewer than a codebook could ever hold, but the reader refuses them."""
    weight, packing = clustered(10, 64, bits=3, density=0.5 if mask else 1.0), Packing(mask=mask, bits=2)
    parts = pack(weight, packing)
    assert parts is None or "codebook" not in parts
    assert same(unpack_state(pack_state({"fc.weight": weight}, {"fc.weight": packing}), {"fc.weight": packing}, "")["fc.weight"], weight)


def test_states_keep_what_is_not_packed():
    state = {"a.weight": sparse(50, 50), "a.bias": torch.randn(50), "b.weight": torch.randn(50, 50)}
    packed = dict.fromkeys(["a.weight", "b.weight"], Packing(mask=True))
    stored = pack_state(state, packed)
    assert stored.keys() == {"a.weight.shape", "a.weight.mask_coded", "a.weight.values", "a.bias", "b.weight"}
    again = unpack_state(stored, packed, "")
    assert again.keys() == state.keys()
    assert all(same(again[name], state[name]) for name in state)


def test_assignments_name_the_values():
    weight = clustered(30, 30, bits=2, density=0.5)
    found = assignments(weight, Packing(mask=True, bits=2))
    assert ((found == -1) == (weight == 0)).all()
    for index in range(4):
        assert len(weight[found == index].unique()) == 1
    assert assignments(weight, Packing(mask=True, bits=1)) is None
    assert assignments(weight, Packing(bits=2)) is None, "zero is a fifth value"


def test_values_used_unevenly_are_coded():
    """Huffman's code takes at most 1 bit more than the entropy, and here hardly any."""
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).mul(2).round().clamp(-7, 8)
    weight = torch.where(weight == 0, 0.5, weight)
    counts = weight.unique(return_counts=True)[1].double() / weight.numel()
    entropy = -float((counts * counts.log2()).sum())
    parts = pack(weight, Packing(bits=4))
    assert entropy <= 8 * parts["indices_coded"].nbytes / weight.numel() < 1.05 * entropy < 0.9 * 4
    assert same(unpack(parts, Packing(bits=4), ""), weight)
    for broken in (parts["indices_coded"][:-3], torch.cat([parts["indices_coded"], torch.zeros(1, dtype=torch.uint8)])):
        with pytest.raises(VariantError, match=r"indices_coded: expected 90000 indices of 90000 elements, Huffman-coded, found"):
            unpack({**parts, "indices_coded": broken}, Packing(bits=4), "w")
    bomb = zlib.compress(bytes(10**8), 9, wbits=-15)
    with pytest.raises(VariantError, match="Huffman-coded, found more or fewer"):
        unpack({**parts, "indices_coded": torch.tensor(list(bomb), dtype=torch.uint8)}, Packing(bits=4), "w")


def flipped(tensor, bit):
    out = tensor.clone()
    out[bit // 8] ^= 1 << bit % 8
    return out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.pop("shape"), "shape: expected a packed parameter's shape, found only"),
        (lambda p: p.update(shape=torch.tensor([64, 65])), r"mask: expected 520 bytes for 4160 elements, found 512"),
        (lambda p: p.update(shape=torch.tensor([-64, -64])), "shape: expected at most 16 sizes of 1 to"),
        (lambda p: p.update(shape=torch.tensor([0, 64])), "shape: expected at most 16 sizes of 1 to"),
        (lambda p: p.update(shape=torch.tensor([2**31 - 1] * 2)), "shape: expected at most 2147483647 elements"),
        (lambda p: p.update(shape=torch.ones(20, dtype=torch.int64)), "shape: expected at most 16 sizes"),
        (lambda p: p.update(shape=torch.tensor([64.0, 64.0])), "shape: expected one dimension of sizes"),
        (lambda p: p.update(mask=p["mask"][:-1]), "mask: expected 512 bytes for 4096 elements, found 511"),
        (lambda p: p.update(mask=p["mask"].float()), "mask: expected one dimension of bytes, found .* float32"),
        (lambda p: p.update(mask=flipped(p["mask"], 9)), "indices|codebook|values: expected"),
        (lambda p: p.update(codebook=p["codebook"][:2]), "indices: expected"),
        (lambda p: p.update(codebook=p["codebook"][:0]), "codebook: expected at most 8 values"),
        (lambda p: p.update(codebook=torch.arange(9.0)), "codebook: expected at most 8 values, as its record says, found 9"),
        (lambda p: p.update(codebook=p["codebook"][:7]), "indices: expected all below 7"),
        (lambda p: p.update(codebook=p["codebook"].int()), "codebook: expected one dimension of floats"),
        (lambda p: p.update(indices=p["indices"][:-1]), "indices: expected .* bytes for"),
        (lambda p: p.pop("indices"), "indices: expected a packed parameter's indices"),
    ],
)
def test_damage_is_one_clear_error(change, said):
    packing = Packing(mask=True, bits=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "WORTH", 0)  # what is not coded can be damaged in more ways
        parts = pack(clustered(64, 64, bits=3, density=0.02), packing)
    assert {"mask", "indices"} <= parts.keys()
    change(parts)
    with pytest.raises(VariantError, match=f"^file: 'w'\\.({said})"):
        unpack(parts, packing, "file: 'w'")


def test_values_are_counted():
    parts = pack(sparse(64, 64), Packing(mask=True))
    with pytest.raises(VariantError, match=r"values: expected the \d+ that its mask keeps, found 3"):
        unpack({**parts, "values": parts["values"][:3]}, Packing(mask=True), "w")
    full = {"mask": torch.full((497,), 255, dtype=torch.uint8)}
    with pytest.raises(VariantError, match=r"mask: expected one of mask and mask_coded, found both"):
        unpack({**pack(sparse(63, 63), Packing(mask=True)), **full}, Packing(mask=True), "w")
    with pytest.raises(VariantError, match=r"mask: expected bits after the last element that are 0"):
        unpack({"shape": torch.tensor([63, 63]), "values": torch.ones(3976), **full}, Packing(mask=True), "w")
    with pytest.raises(VariantError, match=r"codebook: expected none in its record, found"):
        unpack(pack(clustered(64, 64, bits=3), Packing(bits=3)), Packing(mask=True), "w")


def test_nothing_is_allocated_for_a_shape_that_does_not_fit(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("allocated")

    parts = {**pack(clustered(64, 64, bits=3), Packing(bits=3)), "shape": torch.tensor([2**15, 2**15])}
    for where in ((np, "empty"), (torch, "zeros"), (np, "unpackbits")):
        monkeypatch.setattr(*where, refuse)
    with pytest.raises(VariantError, match="indices: expected"):
        unpack(parts, Packing(bits=3), "w")
    with pytest.raises(VariantError, match="shape: expected at most 1000 elements, in proportion to its file, found 1073741824"):
        unpack(parts, Packing(bits=3), "w", most=1000)

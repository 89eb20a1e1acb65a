"""The record: what it accepts, what it refuses and how, and that records of records stay records of the base."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo_compress.errors import CompressError, VariantError
from zoo_compress.structure.layout import Axis, Layout
from zoo_compress.structure.stored import MAX_TERM
from zoo_compress.structure.variant import Variant, record


def plain(**changes):
    valid = {
        "version": 1,
        "method": "pruned",
        "base": "resnet18",
        "base_args": {"act_layer": "silu", "stages": [1, {"width": 2.5}]},
        "sizes": {"c0": 8, "h": 2},
        "params": {"conv.weight": ["c0", None, "3 h + 2", "3"]},
        "attributes": {"conv.out_channels": "c0", "feature_info[2].num_chs": "c0"},
        "scales": {"attn.scale": "h"},
        "provenance": {"seed": 1, "recipe": "x", "parent": None},
    }
    return {**valid, **changes}


def layout(**axes):
    return Layout(
        params={"conv.weight": ("c0", "3", "3"), "head.weight": ("classes", "c0"), "pos": ("1", "49")},
        axes={"c0": Axis(16), "classes": Axis(1000, "class logits"), **axes},
        attributes={"conv.out_channels": "c0", "num_classes": "classes"},
        scales={"scale": "c0"},
    )


def test_survives_json():
    variant = Variant.from_dict(plain())
    assert Variant.from_dict(json.loads(json.dumps(variant.to_dict()))) == variant
    assert variant.shape("conv.weight", (64, 3, 99, 3)) == (8, 3, 8, 3)
    assert variant.architecture == "resnet18__pruned"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": {"c0": "eight", "h": 2}}, ["variant.sizes.c0", "integer", "'eight'"]),
        ({"sizes": {"c0": 10**12, "h": 2}}, ["variant.sizes.c0", "2147483647", "1000000000000"]),
        ({"sizes": {"c0": 0, "h": 2}}, ["variant.sizes.c0", "greater than or equal to 1", "found 0"]),
        ({"sizes": {"c0": True, "h": 2}}, ["variant.sizes.c0", "integer", "True"]),
        ({"sizes": {"c0": 8.0, "h": 2}}, ["variant.sizes.c0", "integer", "8.0"]),
        ({"sizes": {"c0": 8}}, ["'h'", "no entry in sizes"]),
        ({"sizes": [8]}, ["variant.sizes", "dictionary", "list"]),
        ({"version": 2}, ["newer zoo_compress", "format 2", "upgrade"]),
        ({"version": None}, ["variant.version", "nothing"]),
        ({"version": "1"}, ["variant.version", "'1'"]),
        ({"hook": "os.system"}, ["variant.hook", "extra"]),
        ({"base": "../resnet18"}, ["variant.base", "pattern"]),
        ({"base": 3}, ["variant.base", "string", "3"]),
        ({"method": "Pruned"}, ["variant.method", "pattern"]),
        ({"params": {"conv.weight": "c0"}}, ["variant.params.conv.weight", "'c0'"]),
        ({"params": {"conv.weight": [8]}}, ["variant.params.conv.weight.0", "string", "8"]),
        ({"params": {"conv.weight": ["c0 *"]}}, ["'c0 *'", "unexpected character"]),
        ({"params": {"conv.weight": ["c" * (MAX_TERM + 1)]}}, ["variant.params.conv.weight.0", str(MAX_TERM)]),
        ({"params": {"conv.weight": ["(" * 2000 + "c0" + ")" * 2000]}}, ["nested deeper"]),
        ({"params": {f"p{i}": ["(c0 + h) " + f"{i} h " * 600] for i in range(40)}}, ["too long altogether"]),
        ({"attributes": {"conv.out_channels": 8}}, ["variant.attributes.conv.out_channels", "string"]),
        ({"base_args": {"pretrained_cfg_overlay": {"url": "http://x/y.pth"}}}, ["pretrained_cfg_overlay", "factory"]),
        ({"base_args": {"feature_cls": "fx"}}, ["feature_cls", "factory"]),
        ({"base_args": {"keep": 0.5}}, ["keep", "factory"]),
        ({"base_args": {"x": "y" * 10**6}}, ["variant.base_args", "65536"]),
        ({"base_args": {"x": float("nan")}}, ["variant.base_args"]),
        ({"provenance": {"log": ["a"]}}, ["variant.provenance.log"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refuses_in_one_line(changes, said):
    with pytest.raises(VariantError) as caught:
        Variant.from_dict(plain(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for part in said:
        assert part in message


@pytest.mark.parametrize("obj", [None, 3, "variant", [], ["version"]])
def test_refuses_what_is_no_dict(obj):
    with pytest.raises(CompressError, match="expected a dict, found"):
        Variant.from_dict(obj)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(plain())), json_values)
def test_any_json_is_a_record_or_a_variant_error(key, value):
    with suppress(VariantError):
        Variant.from_dict(plain(**{key: value}))


def test_a_sum_of_two_hundred_axes_fits():
    names = [f"c{1000 + i}" for i in range(200)]
    term = " + ".join(f"{name} s12" for name in names)
    variant = Variant.from_dict(plain(sizes={**dict.fromkeys(names, 3), "s12": 5}, params={"w": [term]}, attributes={}, scales={}))
    assert variant.shape("w", (10**4,)) == (3000,)


def test_records_only_what_may_differ_from_the_base():
    variant = record(layout(), {"c0": 8, "classes": 1000}, method="pruned", base="resnet18")
    assert variant.sizes == {"c0": 8}
    assert variant.params == {"conv.weight": ("c0", None, None), "head.weight": (None, "c0")}
    assert variant.attributes == {"conv.out_channels": "c0"}
    assert variant.size(variant.scales["scale"]) == 8
    assert variant.shape("head.weight", (37, 16)) == (37, 8)


def test_pruning_the_pruned_records_against_the_base():
    first = record(layout(), {"c0": 8, "classes": 1000}, method="pruned", base="resnet18", base_args={"a": 1})
    frozen = Layout(
        params={"conv.weight": ("x", "3", "3"), "head.weight": ("classes", "x"), "pos": ("1", "t")},
        axes={"x": Axis(8, "no rule"), "classes": Axis(1000, "class logits"), "t": Axis(49)},
        attributes={"conv.out_channels": "x"},
    )
    second = record(frozen, {"x": 8, "classes": 1000, "t": 7}, method="pruned", base="resnet18", previous=first)
    assert second.params == {"conv.weight": ("8", None, None), "head.weight": (None, "8"), "pos": (None, "t")}
    assert second.attributes == {"conv.out_channels": "8"}
    assert second.scales == {"scale": "8"}

    again = record(layout(c0=Axis(8)), {"c0": 4, "classes": 1000}, method="pruned", base="resnet18", previous=first)
    for name, base in {"conv.weight": (16, 3, 3), "head.weight": (1000, 16)}.items():
        assert again.shape(name, base) == tuple({16: 4}.get(n, n) for n in base)


def test_record_refuses_arguments_that_are_no_json():
    with pytest.raises(VariantError, match=r"base_args\.act"):
        record(layout(), {"c0": 8, "classes": 1000}, method="pruned", base="resnet18", base_args={"act": print})

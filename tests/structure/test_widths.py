"""Groups of axes that change in step."""

import pytest

from zoo_compress import Axis, Layout
from zoo_compress.structure.widths import Group, groups, least


def layout(sizes, *links):
    return Layout(params={name: (name,) for name in sizes}, axes={name: Axis(size) for name, size in sizes.items()}, links=links)


@pytest.mark.parametrize(
    ("sizes", "links", "expected"),
    [
        ({"a": 6}, [], [Group(("a",), (6,), 6)]),
        ({"e": 32, "h": 8, "d": 4}, [("e", "h d")], [Group(("e", "h"), (32, 8), 8)]),
        # Three heads are few steps: their width shrinks instead.
        ({"e": 48, "h": 3, "d": 16}, [("e", "h d")], [Group(("e", "d"), (48, 16), 16)]),
        # A width that doubles on its way: scaling all four leaves one step.
        ({"g": 76, "c": 2, "h": 19, "d": 8}, [("g c", "h d")], [Group(("g", "h"), (76, 19), 19)]),
    ],
)
def test_linked_axes_scale_together(sizes, links, expected):
    assert groups(layout(sizes, *links)) == expected


def test_least_keeps_a_fraction_and_one_element():
    assert least(layout({"a": 100, "b": 5}), 0.1) == {"a": 10, "b": 1}
    assert least(layout({"e": 32, "h": 8, "d": 4}, ("e", "h d")), 0.3) == {"e": 12, "h": 3}

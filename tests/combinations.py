"""Every combination of several values; the quick tests take half of them."""

import itertools
from collections.abc import Mapping

import pytest


def half_quick(axes: Mapping[str, Mapping[str, object]]) -> pytest.MarkDecorator:
    """`parametrize` by all combinations of the axes' values ({argument: {id: value}}), every other one slow.

    Of two that differ in one axis alone, one is quick. With three axes or more any value meets, in the quick ones, any
    value of another axis; with two it meets every second one.
    """
    found = []
    for numbered in itertools.product(*(enumerate(values.items()) for values in axes.values())):
        numbers, named = zip(*numbered, strict=True)
        names, values = zip(*named, strict=True)
        marks = pytest.mark.slow if sum(numbers) % 2 else ()
        found.append(pytest.param(*values, id="-".join(names), marks=marks))
    return pytest.mark.parametrize(list(axes), found)

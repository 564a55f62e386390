"""Sweeps of which a sample runs by default, and all of them with ``-m soak``."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest


def thinned(*axes: Iterable[object], keep_one_in: int) -> list[object]:
    """The product of the axes, one in ``keep_one_in`` of it by default.

    Along every axis in turn, so that each value of one meets as many values of the others as there is room for.
    """
    values = [tuple(axis) for axis in axes]
    found = []
    for places in product(*(range(len(axis)) for axis in values)):
        point = [axis[place] for axis, place in zip(values, places, strict=True)]
        marks = () if sum(places) % keep_one_in == 0 else (pytest.mark.soak,)
        found.append(pytest.param(*point, marks=marks, id="-".join(map(str, point))))
    return found

"""The exponents that `tests.benchmarks.scaling` prints are those of the figures."""

from __future__ import annotations

import pytest

from tests.benchmarks.scaling import growth

SIZES = (1_000, 10_000, 100_000, 1_000_000)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.3, 2.0])
def test_a_power_law_has_its_exponent(exponent: float) -> None:
    assert growth({size: 3e-5 * size**exponent for size in SIZES}) == pytest.approx((exponent, exponent))


def test_fixed_costs_hide_neither_a_line_nor_a_square() -> None:
    line = {size: 0.3 + 3e-5 * size for size in SIZES}
    square = {size: 0.3 + 3e-5 * size + 1e-10 * size**2 for size in SIZES}
    assert 0.9 < growth(line)[0] <= growth(line)[1] <= 1.0
    assert growth(square)[0] > 1.3


def test_two_sizes_are_always_taken() -> None:
    assert growth({1: 1.0, 2: 1.0}) == pytest.approx((0.0, 0.0))
    assert growth({1: 1.0, 10: 2.0, 100: 2.5}) == pytest.approx((0.0969, 0.0969), abs=1e-4)

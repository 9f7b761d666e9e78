"""The symmetric quantisers of `mulm` and `tck`, against vectors worked by hand and against Max's table."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oscar_radix.codec.uniform import GAUSSIAN_MSE, GAUSSIAN_STEP, decode_, encode, energy_weights, row_scale, unbiased_scale


def quantise(codes, scale, sigma, widths):
    """(row scale, codes, decoded) of one int8 row."""
    codes, scale = torch.tensor(codes, dtype=torch.int8), torch.tensor(scale, dtype=torch.float16)
    sigma, widths = torch.tensor(sigma, dtype=torch.float64), torch.tensor(widths)
    used = widths > 0
    weights = energy_weights(sigma.square(), used)
    unit = 1.0 / (weights.max() * sigma[used].min() ** 2 * used.sum())
    row = row_scale(codes, scale, weights, unit)
    step = (torch.tensor([GAUSSIAN_STEP[int(w)] for w in widths]) * sigma).float()
    top = (2.0**widths - 1).float()
    coded = encode(codes, scale, row, 1 / step, top)
    return row.item(), coded.tolist(), decode_(coded.float(), row, step, top / 2)


def test_four_levels_by_hand():
    # y = (3, -3, 1, -1): rms sqrt(5) = 2.236, step .9957 * 2.236 = 2.2266; y/step = +-1.347, +-.449.
    row, codes, decoded = quantise([3, -3, 1, -1], 1.0, [1.0] * 4, [2] * 4)
    assert row == pytest.approx(5**0.5, rel=2**-11)
    assert codes == [3, 0, 2, 1]
    torch.testing.assert_close(decoded, torch.tensor([3.340, -3.340, 1.1133, -1.1133]), rtol=1e-3, atol=0)


def test_mixed_widths_by_hand():
    # y = (8, -1, .5, 2.5) over sigma (8, 2, 1, .5) at 4, 2, 1, 0 bits: normalised energy (1 + 1/4 + 1/4)/3 = 1/2, the 0-bit
    # channel not counted; steps * .7071 = (1.896, 1.408, 1.128).
    row, codes, decoded = quantise([16, -2, 1, 5], 0.5, [8.0, 2.0, 1.0, 0.5], [4, 2, 1, 0])
    assert row == pytest.approx(0.5**0.5, rel=2**-10)
    assert codes == [12, 1, 1, 0]
    torch.testing.assert_close(decoded, torch.tensor([8.532, -0.7040, 0.5641, 0.0]), rtol=1e-3, atol=0)


def test_rounding_is_half_up_and_zero_rows_stay_zero():
    step = torch.ones(4)
    codes = torch.tensor([0, 1, 2, -1], dtype=torch.int8)
    one = torch.tensor(1.0, dtype=torch.float16)
    assert encode(codes, one, one, step, torch.full((4,), 3.0)).tolist() == [2, 3, 3, 1]
    assert quantise([0] * 4, 0.0, [1.0] * 4, [2] * 4)[2].tolist() == [0.0] * 4


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8])
def test_steps_and_errors_are_the_optimum_for_a_gaussian(width):
    x = torch.linspace(-10, 10, 400001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    top = 2**width - 1

    def mse(step: float) -> float:
        levels = ((x / step + (top + 1) / 2).floor().clamp(0, top) - top / 2) * step
        return float(((x - levels).square() * density).sum())

    best = GAUSSIAN_STEP[width]
    assert mse(best) == pytest.approx(GAUSSIAN_MSE[width], abs=2e-6)
    assert mse(best) <= min(mse(best * 1.01), mse(best * 0.99))


def test_row_scale_is_exact_in_any_order():
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (100, 256), generator=draw, dtype=torch.int8)
    sigma = torch.logspace(-3, 1, 256, dtype=torch.float64)
    weights = energy_weights(sigma.square(), torch.ones(256, dtype=torch.bool))
    order = torch.randperm(256, generator=draw)
    scale, unit = torch.ones(100, dtype=torch.float16), torch.tensor(1e-12, dtype=torch.float64)
    assert torch.equal(row_scale(codes, scale, weights, unit), row_scale(codes[:, order], scale, weights[order], unit))


@given(st.integers(1, 64), st.integers(0, 2**31))
def test_rows_are_read_as_long_as_they_are(dim, seed):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(-127, 128, (20, dim), generator=draw, dtype=torch.int8)
    rows[0] = 0
    scale = torch.rand(20, generator=draw).add(0.01).half()
    top = torch.full((dim,), 3.0)
    coded = encode(rows, scale, scale * 100, torch.ones(dim), top)
    read = decode_(coded.float(), unbiased_scale(rows, scale, coded), torch.ones(dim), top / 2)
    exact = rows.float() * scale.float().unsqueeze(-1)
    torch.testing.assert_close((read * exact).sum(-1), exact.square().sum(-1), rtol=2**-10, atol=0)
    assert not read[0].any()

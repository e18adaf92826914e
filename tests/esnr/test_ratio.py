"""ESNR from the gradients of microbatches: what it should be on average, exactly, and where it is undefined."""

from __future__ import annotations

import math

import pytest
import torch

from ttcfast import esnr
from ttcfast.pwm.utils.metrics import ESNR


@pytest.mark.parametrize("rho", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("M", [2, 8, 16, 32])
def test_raw_and_unbiased_are_what_the_theory_expects_on_average(M, rho):
    """Gradients with mean G and covariance I, ``||G||^2 = rho tr I``: raw is biased to (rho + 1/M) M/(M-1), 1/(M-1) for pure noise."""
    dimension, trials = 1000, 150
    mean = torch.randn(dimension)
    mean *= math.sqrt(rho * dimension) / mean.norm()
    found = [esnr(mean + torch.randn(M, dimension)) for _ in range(trials)]
    raw, unbiased = (sum(getattr(f, name) for f in found) / trials for name in ("raw", "unbiased"))
    assert raw == pytest.approx((rho + 1 / M) * M / (M - 1), rel=0.015)
    assert unbiased == pytest.approx(rho, rel=0.02, abs=0.004)


def test_every_value_of_a_small_example_by_hand():
    found = esnr(torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 3.0], [2.0, -3.0]]), microbatch_size=5)
    # mean (2, 0); squared norms 9, 1, 13, 13
    assert found.M == 4 and found.mean_sq_norm == 9.0
    assert found.raw == pytest.approx(4 / 5) and found.raw_db == pytest.approx(10 * math.log10(0.8))
    assert found.trace_var == pytest.approx(5 * 4 / 3)
    signal = 4 - 5 / 3  # ||mu||^2 - Var/(M-1)
    assert found.unbiased == pytest.approx(signal / found.trace_var) and found.unbiased_db == pytest.approx(10 * math.log10(0.35))
    assert found.noise_scale == pytest.approx(5 * found.trace_var / signal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_lists_of_gradients_are_the_rows_of_the_matrix(dtype):
    rows = torch.randn(5, 30).to(dtype)
    expected = esnr(rows)
    by_parameter = [[row[:6].reshape(2, 3), row[6:].reshape(4, 6)] for row in rows]
    for grads in (by_parameter, list(rows), tuple(map(tuple, by_parameter))):
        assert esnr(grads) == pytest.approx(expected)


def test_small_noise_on_a_large_mean_keeps_its_digits():
    """The difference E||g||^2 - ||mu||^2 in float32 would be 0 here."""
    rows = 1000 + 1e-2 * torch.randn(4, 3000)
    wide = rows.double()
    variance = (wide - wide.mean(0)).square().sum() / 4
    found = esnr(rows)
    assert found.trace_var == pytest.approx(float(variance) * 4 / 3, rel=1e-10)
    assert found.raw == pytest.approx(float(wide.mean(0).square().sum() / variance), rel=1e-10)


def test_many_columns_are_summed_in_parts(monkeypatch):
    rows = torch.randn(3, 1000, dtype=torch.float64)
    expected = esnr(rows)
    monkeypatch.setattr("ttcfast.esnr.ratio.COLUMNS", 64)
    assert esnr(rows) == pytest.approx(expected, rel=1e-12)


def test_decibels_are_nan_where_the_estimate_is_not_positive():
    opposite = esnr(torch.tensor([[1.0, 0.0], [-1.0, 1e-3]]))
    assert opposite.raw > 0 and math.isfinite(opposite.raw_db)
    assert opposite.unbiased < 0 and math.isnan(opposite.unbiased_db) and math.isnan(opposite.noise_scale)
    cancelled = esnr(torch.tensor([[1.0], [-1.0]]))
    assert cancelled.raw == 0 and math.isnan(cancelled.raw_db)


def test_gradient_without_noise_reads_finite_and_none_at_all_reads_nan():
    still = esnr(torch.ones(3, 10))
    assert still.raw == 2.0**52 and still.trace_var == 0 and math.isfinite(still.unbiased_db)
    zero = esnr(torch.zeros(3, 10))
    assert math.isnan(zero.raw) and math.isnan(zero.unbiased) and zero.mean_sq_norm == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(bad):
    found = esnr(torch.tensor([[1.0, bad], [1.0, 2.0]]))
    assert isinstance(found, ESNR) and found.M == 2
    assert not any(math.isfinite(value) for value in found if value != 2)


G = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("M is 1; ESNR needs the gradients of at least 2 microbatches", lambda: esnr(G[:1])),
        ("M is 0; ESNR needs", lambda: esnr([])),
        ("M is 1; ESNR needs", lambda: esnr([[G, G]])),
        (r"grads has shape \(4, 2, 3\); expected \[M, P\]", lambda: esnr(G.reshape(4, 2, 3))),
        ("grads is torch.int64; gradients are floating point", lambda: esnr(G.long())),
        ("the microbatches have 2, 1 gradients", lambda: esnr([[G, G], [G]])),
        (r"grads\[1\]\[1\] has shape \(6, 4\) and grads\[0\]\[1\] \(4, 6\)", lambda: esnr([[G, G], [G, G.T]])),
        (r"grads\[1\]\[0\] is torch.float64 on cpu and the first gradient torch.float32", lambda: esnr([[G], [G.double()]])),
        (
            r"grads\[0\]\[1\] is torch.float32 on meta and the first gradient torch.float32 on cpu",
            lambda: esnr([[G, G.to("meta")], [G, G]]),
        ),
        (r"grads\[1\]\[0\] is None; leave out parameters", lambda: esnr([[G], [None]])),
        ("microbatch_size is 0; it must be at least 1", lambda: esnr(G, microbatch_size=0)),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

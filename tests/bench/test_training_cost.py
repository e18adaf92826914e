"""What PWM's training costs: FLOPs by hand, and what a size, a kind and a suite change."""

from __future__ import annotations

from itertools import pairwise

import pytest

from bench.training_cost import CRITIC_PASSES, HORIZON, POLICY_BATCH, WM_BATCH, costs, rows
from ttcfast.pwm.models.base import SIZES


def products(widths: list[int]) -> int:
    return sum(a * b for a, b in pairwise(widths))


def test_flops_are_those_of_the_products():
    of = SIZES["5M"]
    observation, action, latent = 24 + of["task_dim"], 6 + of["task_dim"], of["latent_dim"]
    encoder = products([observation, *of["encoder_units"], latent])
    dynamics, head = (products([latent + action, *of["units"], out]) for out in (latent, 101))
    first = observation * of["encoder_units"][0]  # of which no gradient with respect to the input is formed
    expected = 6 * HORIZON * WM_BATCH * (dynamics + head) + WM_BATCH * (2 * HORIZON * encoder + 6 * encoder - 2 * first)
    wm, policy = costs("5M", "mlp", "MT30")
    assert wm.flops == pytest.approx(expected, rel=1e-3)
    critic = 3 * products([latent, 400, 200, 1])
    assert policy.flops > 4 * HORIZON * POLICY_BATCH * (dynamics + head) + 4 * CRITIC_PASSES * HORIZON * POLICY_BATCH * critic


def test_a_flow_and_a_larger_model_cost_more():
    small, flow, large = (costs(size, kind, "MT30")[0] for size, kind in (("5M", "mlp"), ("5M", "heun"), ("19M", "mlp")))
    assert 2 < flow.flops / small.flops < 4 and large.flops > 2 * small.flops and small.bytes < large.bytes < 2**33


def test_hours_fall_with_the_rate():
    slow, fast = ([float(row[-2].replace(",", "")) for row in rows(rate, ("5M",))] for rate in (10, 1000))
    assert len(slow) == 4 and all(100 * b == pytest.approx(a, rel=0.2, abs=60) for a, b in zip(slow, fast))

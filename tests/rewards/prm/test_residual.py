"""The equations as features: an exact solution leaves nothing, a wrong one does; walls; what they need."""

from __future__ import annotations

import math

import pytest
import torch

from ttcfast.core.normalizer import Normalizer
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.rewards.prm.residual import EulerResidual
from ttcfast.spec import StateSpec

UNIT = Normalizer(torch.zeros(4).double(), torch.ones(4).double(), torch.ones(4).double())
FLOW = (0.7, -0.4)


def density_wave(cells: int, time: float, flow: tuple[float, float] = FLOW) -> torch.Tensor:
    """A density wave in a uniform flow of uniform pressure: it moves and keeps its shape, an exact solution."""
    at = (torch.arange(cells).double() + 0.5) / cells
    phase = 2 * math.pi * ((at[:, None] - flow[0] * time) + (at[None, :] - flow[1] * time))
    density = 1 + 0.2 * phase.sin()
    energy = 1 / 0.4 + 0.5 * density * (flow[0] ** 2 + flow[1] ** 2)
    return torch.stack([density, density * flow[0], density * flow[1], energy]).unsqueeze(0)


def residual_of(cells: int, dt: float, candidate_time: float, spec: StateSpec | None = None) -> torch.Tensor:
    spec = StateSpec.euler2d() if spec is None else spec
    features = EulerResidual(dt, (1 / cells, 1 / cells))
    state, candidate = density_wave(cells, 0.0), density_wave(cells, candidate_time)
    return features.of_candidates(state, candidate.unsqueeze(1), spec, UNIT, spec.periodic_axes)[:, 0, 8:12]


def test_the_residual_of_an_exact_step_falls_with_the_fifth_power_of_step_and_cell():
    # dt * (h^4 of the differences) and dt^5 of Simpson's rule, with dt proportional to h
    coarse, fine = residual_of(16, 0.08, 0.08).abs().max(), residual_of(32, 0.04, 0.04).abs().max()
    assert math.log2(coarse / fine) == pytest.approx(5, abs=0.2)


def test_a_candidate_that_lags_has_a_residual_as_large_as_what_it_missed():
    missed = (density_wave(32, 0.04) - density_wave(32, 0.02)).abs().max()
    assert residual_of(32, 0.04, 0.02).abs().max() > 0.5 * missed
    assert residual_of(32, 0.04, 0.04).abs().max() < 1e-3 * missed


def test_open_sides_see_no_neighbour_across_the_border():
    """A step in density across the border of an open axis gives no rate there; across that of a periodic one it does."""
    state = density_wave(16, 0.0, (1.0, 0.0)).mean((2, 3), keepdim=True).expand(1, 4, 16, 16).clone()
    state[:, :, 8:] *= 2
    features = EulerResidual(0.1, (1 / 16, 1 / 16))
    rates = [features.rate(state, StateSpec.euler2d(), periodic)[0] for periodic in ((True, True), (False, True))]
    assert rates[0][:, 0, 0].abs().min() > 1 and float(rates[1][:, :, 0].abs().max()) == 0
    assert torch.equal(rates[0][:, :, 4:12], rates[1][:, :, 4:12])


def test_a_reward_model_with_it_shares_the_states_part_and_is_saved_with_it(tmp_path):
    spec = StateSpec.euler2d()
    model = DensePRM(8, 8, levels=2, patch=2, normalizer=UNIT, spec=spec, residual={"dt": 0.05, "cell": (1 / 16, 1 / 16)}).double()
    torch.nn.init.normal_(model.out.weight)
    state = torch.cat([density_wave(16, 0.0), density_wave(16, 0.3)])
    candidates = torch.stack([density_wave(16, t).expand(2, 4, 16, 16) for t in (0.0, 0.02, 0.05)], 1)
    group = model.error_group(state, candidates)
    for b in range(3):
        torch.testing.assert_close(group[:, b], model.error(state, candidates[:, b]), rtol=1e-6, atol=1e-6)
    model.float().save_pretrained(tmp_path)
    again = DensePRM.from_pretrained(tmp_path)
    assert again.residual == model.residual
    assert torch.equal(again.error(state.float(), candidates[:, 1].float()), model.eval().error(state.float(), candidates[:, 1].float()))


@pytest.mark.parametrize(
    ("spec", "normalizer", "said"),
    [
        (StateSpec.pdegym(), UNIT, "conserved variables"),
        (StateSpec.euler2d(gamma=torch.tensor([1.4, 1.3])), UNIT, "one gamma"),
        (StateSpec.euler2d(), None, "normalizer"),
    ],
)
def test_what_the_features_cannot_be_computed_for_is_said(spec, normalizer, said):
    with pytest.raises(ValueError, match=said):
        DensePRM(8, 8, normalizer=normalizer, spec=spec, residual={"dt": 0.05, "cell": (0.1, 0.1)})
    with pytest.raises(ValueError, match="dt is 0"):
        EulerResidual(0.0, (0.1, 0.1))

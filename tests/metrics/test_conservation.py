import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.surrogates import euler_state, shifted
from ttcfast.metrics import conservation_drift
from ttcfast.metrics.conservation import conserved_fields
from ttcfast.physics import to_primitive
from ttcfast.spec import StateSpec

SPEC = StateSpec.euler2d(cell_volume=0.25)


def test_a_rolled_trajectory_conserves_everything():
    drift = conservation_drift(shifted(euler_state(), 5), SPEC)
    assert set(drift) == {"mass", "momentum", "energy"}
    for name, d in drift.items():
        assert d.shape == (3, 6) and d.dtype == torch.float64
        assert d.max() < 1e-14, name


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-7, 0.5), st.sampled_from([0, 1, 2, 3]))
def test_an_offset_of_one_channel_is_measured_relative_to_its_size(offset, channel):
    x = euler_state(dtype=torch.float64)
    y = x.clone()
    y[:, channel] += offset
    drift = conservation_drift(torch.stack([x, y], 1), SPEC)
    name = ("mass", "momentum", "momentum", "energy")[channel]
    rho, m, energy = x[:, 0], x[:, 1:3], x[:, 3]
    p = 0.4 * (energy - 0.5 * (m**2).sum(1) / rho)
    momentum = (m.square().sum(1).sqrt() + (1.4 * p * rho).sqrt()).sum((1, 2))
    size = {"mass": rho.sum((1, 2)), "momentum": momentum, "energy": energy.sum((1, 2))}[name]
    torch.testing.assert_close(drift[name][:, 1], offset * 64 / size, rtol=1e-6, atol=0)
    for other in {"mass", "momentum", "energy"} - {name}:
        assert drift[other].max() == 0


def test_a_residual_far_below_the_integrals_rounding_is_exact():
    x = torch.ones(1, 4, 256, 256) * torch.tensor([1.0, 0.0, 0.0, 2.5]).reshape(4, 1, 1)
    y = x.clone()
    y[0, 0, 0, 0] += 2.0**-20  # 1.5e-11 of the total mass
    drift = conservation_drift(torch.stack([x, y], 1), SPEC)["mass"][0, 1]
    assert drift.item() == pytest.approx(2.0**-20 / 256**2, rel=1e-12)


def test_momentum_terms_combine_as_asked():
    x = euler_state(1, dtype=torch.float64)
    y = x.clone()
    y[:, 1] += 0.3
    y[:, 2] -= 0.4
    t = torch.stack([x, y], 1)
    total, parts, norm = (conservation_drift(t, SPEC, momentum=m)["momentum"][0, 1].item() for m in ("sum", "components", "norm"))
    assert total / parts == pytest.approx(1 / 7)
    assert norm / parts == pytest.approx(5 / 7)


def test_the_size_of_momentum_does_not_vanish_with_the_total_momentum():
    x = torch.zeros(1, 4, 4, 4)
    x[:, 0], x[:, 3] = 1.0, 2.5
    y = x.clone()
    y[:, 1] += 0.1
    drift = conservation_drift(torch.stack([x, y], 1), SPEC)["momentum"]
    assert drift[0, 1].item() == pytest.approx(0.1 / 1.4**0.5, rel=1e-5)


def test_primitive_layouts_give_the_same_drift():
    x = euler_state(2, dtype=torch.float64)
    t = torch.stack([x, x * 1.01], 1)
    primitive = to_primitive(t.flatten(0, 1)).unflatten(0, (2, 2))
    pdebench = primitive[:, :, [1, 2, 0, 3]]  # u, v, rho, p
    expected = conservation_drift(t, SPEC)
    for other, spec in (
        (primitive, StateSpec.pdegym(cell_volume=0.25)),
        (pdebench, StateSpec.pdebench(cell_volume=0.25, gamma=1.4)),
        (t[:, :, [3, 0, 3, 1, 2]], StateSpec.well(cell_volume=0.25)),
    ):
        for name, d in conservation_drift(other, spec).items():
            torch.testing.assert_close(d, expected[name], rtol=1e-9, atol=1e-14)


def test_gamma_per_problem_and_volume_per_cell():
    x = euler_state(2, dtype=torch.float64)
    t = torch.stack([x, x * 1.01], 1)
    gamma, volume = torch.tensor([1.4, 1.2]), torch.rand(8, 8, dtype=torch.float64) + 0.5
    both = conservation_drift(t, SPEC.replace(gamma=gamma, cell_volume=volume))
    for n in range(2):
        alone = conservation_drift(t[n : n + 1], SPEC.replace(gamma=float(gamma[n]), cell_volume=volume))
        for name in both:
            torch.testing.assert_close(both[name][n], alone[name][0], rtol=1e-6, atol=0)


def test_one_trajectory_alone():
    t = shifted(euler_state(1) * 1.5, 3)
    t[:, 2:, 0] += 0.1
    single = conservation_drift(t[0].transpose(0, 1), SPEC)
    torch.testing.assert_close(single["mass"], conservation_drift(t, SPEC)["mass"][0])


def test_conserved_fields_orders_channels():
    x = euler_state(1)
    torch.testing.assert_close(conserved_fields(x[:, [3, 0, 3, 1, 2]], StateSpec.well()), x.double())


def test_missing_channels_are_named():
    with pytest.raises(ValueError, match="trajectory has 3 channels"):
        conservation_drift(torch.zeros(1, 2, 3, 4, 4), SPEC)
    with pytest.raises(ValueError, match="momentum is 'each'"):
        conservation_drift(torch.zeros(1, 2, 4, 4, 4), SPEC, momentum="each")


def test_declared_quantities_drift_relative_to_their_magnitude():
    spec = StateSpec.fields("h", "hu", "hv", "t", conserved={"mass": "h", "momentum": ("hu", "hv")}, cell_volume=0.5)
    first = torch.ones(2, 4, 4, 4)
    later = first + torch.tensor([0.5, 0.3, -0.4, 9.0]).reshape(4, 1, 1)
    drift = conservation_drift(torch.stack([first, later], 1), spec, momentum="norm")
    torch.testing.assert_close(drift["mass"], torch.tensor([[0.0, 0.5]] * 2, dtype=torch.float64))
    torch.testing.assert_close(drift["momentum"], torch.tensor([[0.0, 0.5 / 2**0.5]] * 2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert list(drift) == ["mass", "momentum"]
    assert conservation_drift(torch.stack([first, later], 1), StateSpec.fields("a", "b", "c", "d")) == {}


def test_what_starts_at_rest_drifts_relative_to_what_it_becomes():
    spec = StateSpec.fields("h", "hu", conserved={"mass": "h", "momentum": "hu"})
    frames = torch.zeros(2, 4, 2, 4, 4)
    frames[:, :, 0] = 1.0
    frames[0, 1, 1], frames[0, 2, 1, 0], frames[0, 3, 1] = 0.5, -1.0, torch.nan
    drift = conservation_drift(frames, spec)["momentum"]
    torch.testing.assert_close(drift[0, :3], torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))
    assert drift[0, 3].isnan() and drift[1].eq(0).all()

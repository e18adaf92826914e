"""Candidates along learned fields: keyed, conserving, and of the spread that was put into the data they were learned from."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.surrogates import drop_surrogate, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.experiments.fit_directions import FitDirectionsConfig, fit_directions
from ttcfast.rewards.prm.triplets.build import build_triplets
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import CheckpointError
from ttcfast.spec import StateSpec, StochasticConfig
from ttcfast.stochastic_sampling.directions import HeadFields, LocalFields, _spread_out, load_directions, save_directions
from ttcfast.stochastic_sampling.keyed import Draw

NORMALIZER = Normalizer(torch.tensor([1.0, 0.0, 0.0, 2.5]), torch.full((4,), 0.5), torch.full((4,), 0.1))


def surrogate(**options) -> Surrogate:
    return drop_surrogate(normalizer=NORMALIZER, scale=0.3, **options)


@pytest.fixture(params=["local", "heads"])
def path(request, tmp_path):
    torch.manual_seed(1)
    kind = {"local": LocalFields, "heads": HeadFields}[request.param]
    made = kind(4, (True, True), (0, 1, 2, 3), 2)
    made.mean.normal_(0, 0.1)
    made.spread.normal_(0, 0.1)
    save_directions(tmp_path / "d.safetensors", made, {})
    return str(tmp_path / "d.safetensors")


@pytest.mark.parametrize("grid", [1, 3])
def test_a_candidate_is_a_function_of_its_key(path, grid):
    fm, x = surrogate(), euler_state(3)
    config = StochasticConfig(dropout=False, directions=path, directions_grid=grid)
    options = {"seed": 5, "step": 2, "stochastic": config}
    whole = fm.candidates(x, torch.arange(1, 6), problem_ids=torch.tensor([4, 7, 9]), **options)
    part = fm.candidates(x[1:2], torch.tensor([5, 2]), problem_ids=torch.tensor([7]), **options)
    torch.testing.assert_close(part[0], whole[1, [4, 1]], rtol=1e-5, atol=1e-6)
    other = fm.candidates(x, torch.arange(1, 6), problem_ids=torch.tensor([4, 7, 9]), **{**options, "step": 3})
    assert (other - whole).abs().amax() > 1e-3
    moved = whole - fm.deterministic(x).unsqueeze(1)
    assert moved.mean((3, 4)).abs().max() < 1e-6 and moved.abs().max() > 1e-3, "the totals of the deterministic step are kept"


def test_without_other_noise_the_model_is_called_once_per_problem(path):
    fm, x = surrogate(), euler_state(2)
    fm.model.calls.clear()
    fm.candidates(x, torch.arange(9), seed=0, step=1, stochastic={"dropout": False, "directions": path})
    assert sum(fm.model.calls) == 2


def test_directions_are_added_to_other_noise(path):
    fm, x, ids = surrogate(), euler_state(2), torch.arange(4)
    both = fm.candidates(x, ids, seed=0, step=0, stochastic={"directions": path})
    dropped = fm.candidates(x, ids, seed=0, step=0)
    moved = fm.candidates(x, ids, seed=0, step=0, stochastic={"dropout": False, "directions": path})
    torch.testing.assert_close(both - dropped, moved - fm.deterministic(x).unsqueeze(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_deterministic_step_beside_them_is_not_moved(path, dropout):
    fm, x, ids = surrogate(), euler_state(2), torch.arange(1, 4)
    options = {"seed": 0, "step": 1, "stochastic": {"dropout": dropout, "directions": path}}
    whole = fm.candidates(x, ids, **options, include_deterministic=True)
    torch.testing.assert_close(whole, torch.cat([fm.deterministic(x).unsqueeze(1), fm.candidates(x, ids, **options)], 1))
    fm.model.calls.clear()
    fm.candidates(x, ids, **options, include_deterministic=True)
    assert fm.model.calls == ([2, 8] if dropout else [2])  # the moves are along fields of the deterministic step


def test_pairs_are_opposite_about_the_mean(path):
    fm, x, ids = surrogate(), euler_state(1), torch.arange(1, 5)
    config = StochasticConfig(dropout=False, directions=path, antithetic=True, directions_grid=2)
    found = fm.candidates(x, ids, seed=0, step=0, stochastic=config)[0]
    mean = fm.candidates(x, ids, seed=0, step=1, stochastic=dataclasses.replace(config, directions_scale=0.0))[0]
    torch.testing.assert_close((found[0] + found[1]) / 2, mean[0], rtol=1e-5, atol=1e-6)
    still = fm.candidates(x, ids, seed=0, step=1, stochastic=dataclasses.replace(config, directions_scale=0.0, directions_strength=0.0))[0]
    torch.testing.assert_close(still[0], fm.deterministic(x)[0])


@pytest.mark.parametrize("kind", [LocalFields, HeadFields])
def test_fields_commute_with_shifts(kind):
    torch.manual_seed(0)
    made, z, s = kind(4, (True, True)), torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    shifted = made.fields(z.roll((4, 8), (2, 3)), s.roll((4, 8), (2, 3)))
    torch.testing.assert_close(shifted, made.fields(z, s).roll((4, 8), (3, 4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("space", "periodic"), [((16,), (False,)), ((8, 12), (True, False)), ((4, 4, 6), (True, True, True))])
def test_local_fields_and_smooth_coefficients_in_any_dimension(space, periodic):
    made = LocalFields(3, periodic)
    made.spread.fill_(0.1)
    draw = Draw.of(0, 0, torch.tensor([[0, 1], [0, 2]]))
    assert made.moves(torch.randn(1, 3, *space), torch.randn(1, 3, *space), draw, grid=2).shape == (1, 2, 3, *space)
    field = _spread_out(torch.randn(20000, 1, *[2] * len(space)), space, periodic)
    torch.testing.assert_close(field.var(0)[0], torch.ones(space), rtol=0.06, atol=0)


def test_what_was_put_into_the_data_is_learned(tmp_path):
    """The truth differs from the deterministic step by a known field with random coefficients: it is found, and nothing else."""
    fm, torch_rng = surrogate(), torch.Generator().manual_seed(0)
    x = euler_state(24, 16)
    still = fm.deterministic(x)
    z, s = NORMALIZER.encode(x), NORMALIZER.encode_delta(still - x)
    slopes = LocalFields(4, (True, True)).fields(z, s)[:, 4 * 6 : 4 * 7].sum(1)  # of the step along x, all channels alike
    amount = 0.7 + 0.4 * torch.randn(24, 1, 1, 1, generator=torch_rng)
    truth = torch.stack([x, still + NORMALIZER.decode_delta(amount * slopes)], 1)
    data = build_triplets(fm, truth, tmp_path / "t.hdf5", K=3, T_prm=1)
    made = fit_directions(FitDirectionsConfig(str(data), out=str(tmp_path / "d.safetensors"), rank=1, batch=8, valid=0.25))
    assert made.span < 1e-3 and made.spread < 0.02 < made.mean < 0.6
    found = load_directions(tmp_path / "d.safetensors")
    torch.testing.assert_close(found.mean[24:28], torch.full((4,), 0.7), atol=0.35, rtol=0)
    assert float(found.spread[24:28].abs().mean()) == pytest.approx(0.4, abs=0.2)
    group = fm.candidates(x, torch.arange(1, 17), seed=0, step=0, stochastic={"dropout": False, "directions": str(made.path)})
    errors = (group - truth[:, 1:2]).square().flatten(2).mean(2)
    assert errors.amin(1).mean() < 0.05 * (still - truth[:, 1]).square().mean(), "the best of 16 is far better than the deterministic step"


def test_heads_learn_to_be_near_the_error(tmp_path):
    x = torch.nn.functional.interpolate(euler_state(64, 4), (16, 16), mode="bilinear")
    fm = surrogate()
    still = fm.deterministic(x)
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(16).reshape(-1, 1, 1, 1)  # nothing in the state tells which: two heads can part them
    truth = torch.stack([x, still + 0.05 * sign * (x - x.mean((2, 3), keepdim=True))], 1)
    data = build_triplets(fm, truth, tmp_path / "t.hdf5", K=3, T_prm=1)
    config = FitDirectionsConfig(
        str(data), "heads", str(tmp_path / "d.safetensors"), heads=2, width=16, blocks=1, rank=1, steps=150, lr=5e-3, batch=8, valid=0.2
    )
    made = fit_directions(config)
    assert made.spread < 0.4 and made.mean > 0.8
    assert checkpoints.load(made.path)[1]["steps"] == made.steps == 150


def test_files_and_states_that_do_not_fit_are_refused(path, tmp_path):
    x, options = euler_state(1), {"seed": 0, "step": 0}
    with pytest.raises(CheckpointError, match=r"gone.safetensors does not exist"):
        surrogate().candidates(x, torch.arange(3), **options, stochastic={"directions": str(tmp_path / "gone.safetensors")})
    checkpoints.save(tmp_path / "other.safetensors", {"w": torch.zeros(2)}, {"architecture": "vit"})
    with pytest.raises(CheckpointError, match="has architecture 'vit'; expected 'directions'"):
        surrogate().candidates(x, torch.arange(3), **options, stochastic={"directions": str(tmp_path / "other.safetensors")})
    save_directions(tmp_path / "three.safetensors", LocalFields(3, (True, True)), {})
    with pytest.raises(ValueError, match=r"the directions have 3 channels on 2 space axes; the states are \(4, 8, 8\)"):
        surrogate().candidates(x, torch.arange(3), **options, stochastic={"directions": str(tmp_path / "three.safetensors")})
    with pytest.raises(ValueError, match="directions_grid is 0"):
        StochasticConfig(directions=path, directions_grid=0)


def test_moves_are_differences_without_a_mean_change(path):
    moved = []
    for mean in (None, torch.full((4,), 7.0)):
        fm = drop_surrogate(normalizer=Normalizer(NORMALIZER.mean, NORMALIZER.std, NORMALIZER.delta_std, mean), scale=0.3)
        x = euler_state(2)
        drawn = fm.candidates(x, torch.arange(1, 4), seed=0, step=1, stochastic={"dropout": False, "directions": path})
        moved.append(drawn - fm.deterministic(x).unsqueeze(1))
    torch.testing.assert_close(*moved, atol=1e-5, rtol=0)


def test_given_channels_are_not_moved(tmp_path):
    torch.manual_seed(1)
    made = LocalFields(4, (True, True), (1,), 2)
    made.mean.normal_(0, 0.1)
    made.spread.normal_(0, 0.1)
    save_directions(tmp_path / "d.safetensors", made, {})
    spec = StateSpec.fields("mask", "u", "v", "w", given="mask", conserved="u")
    fm, x = Surrogate(torch.nn.Conv2d(4, 4, 1), spec, normalizer=NORMALIZER), torch.rand(2, 4, 8, 8)
    config = {"dropout": False, "directions": str(tmp_path / "d.safetensors")}
    drawn = fm.candidates(x, torch.arange(1, 4), seed=0, step=1, stochastic=config)
    assert torch.equal(drawn[:, :, 0], x[:, None, 0].expand(-1, 3, -1, -1)) and not torch.equal(drawn[:, 0], drawn[:, 1])

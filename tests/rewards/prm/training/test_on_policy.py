"""Training along corrected rollouts: the pool's states, an error that falls, exact resume, wrong settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.killed import kill_at_update
from ttcfast.core.normalizer import Normalizer
from ttcfast.data import GenerateConfig, generate, open_trajectories
from ttcfast.models.checkpoint import save_surrogate, surrogate_meta
from ttcfast.models.vit import ViT, ViTConfig
from ttcfast.rewards.prm.model import PRM
from ttcfast.rewards.prm.training import on_policy
from ttcfast.rewards.prm.training.on_policy import OnPolicyConfig, RolloutPool, train_on_policy
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError
from ttcfast.spec import StateSpec


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("on_policy")
    common = {"out": str(out), "presets": ("riemann4",), "grid": 8, "frames": 5, "t_end": 0.2, "per_file": 4, "batch": 4}
    generate(GenerateConfig(split="reward", n=4, **common))
    generate(GenerateConfig(split="valid", n=2, **common))
    return out


@pytest.fixture
def config(data, tmp_path):
    """A surrogate that stays where it is (its output layer is zero), so that the whole step is what the reward model has to find."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(grid=(8, 8), patch=2, width=16, depth=1, heads=2, refine=4, dropout=0.1))
    normalizer = Normalizer(torch.tensor([1.0, 0.0, 0.0, 2.5]), torch.ones(4), torch.full((4,), 0.1))
    spec = StateSpec.euler2d(cell_volume=1 / 64)
    save_surrogate(tmp_path / "fm.safetensors", model, surrogate_meta(model, normalizer, spec))
    return OnPolicyConfig(
        fm=str(tmp_path / "fm.safetensors"),
        data=str(data),
        out=str(tmp_path / "run"),
        model={"width": 8, "levels": 2, "patch": 2},
        batch=3,
        steps=8,
        warmup=2,
        valid=2,
        val_every=8,
        save_every=4,
        log_every=2,
        stochastic=0.0,
    )


def test_rollouts_stay_beside_their_truth_and_begin_anew(data):
    pool = RolloutPool(open_trajectories(data, split="reward"), 3, restart=0.3, seed=1)
    for step in range(30):
        state, truth = pool.batch()
        expected = pool.truth[torch.arange(3), pool.time]
        assert torch.equal(state, expected)  # followed exactly, since the truth itself is handed back
        assert state.shape == truth.shape == (3, 4, 8, 8) and bool((pool.time < 4).all())
        after = truth.clone()
        if step == 7:
            after[1] = torch.nan
        pool.advance(after, step)
        assert bool(pool.state.isfinite().all())


def test_it_learns_what_the_surrogate_misses(config):
    folder, validation = train_on_policy(dataclasses.replace(config, steps=120, val_every=120, save_every=120, lr=5e-3))
    assert validation["one_step_ratio_1"] < 0.7 and validation["one_step_ratio_2"] < validation["one_step_ratio_1"]
    model = PRM.from_pretrained(folder)
    assert model.info["training"]["steps_done"] == 120 and model.residual is not None


def test_a_killed_run_ends_with_the_same_weights(config, tmp_path, monkeypatch):
    whole, _ = train_on_policy(config)
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    kill_at_update(6, lambda: train_on_policy(broken), monkeypatch)  # after the save at step 4
    resumed, _ = train_on_policy(broken)
    a, b = (checkpoints.load(place / "model.safetensors")[0] for place in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_it_goes_on_from_an_earlier_reward_model(config, tmp_path):
    first, before = train_on_policy(dataclasses.replace(config, steps=60, lr=5e-3, val_every=60))
    more = dataclasses.replace(config, init=str(first), model={"width": 32}, steps=1, lr=1e-12, out=str(tmp_path / "more"), val_every=1)
    folder, after = train_on_policy(more)
    assert after["one_step_ratio_1"] == pytest.approx(before["one_step_ratio_1"], rel=1e-3)  # with its sizes, not those of model
    assert PRM.from_pretrained(folder).info["init"]["steps_done"] == 60
    PRM(8, 4, 1).save_pretrained(tmp_path / "scalar")
    with pytest.raises(ArgumentError, match="init is"):
        train_on_policy(dataclasses.replace(more, init=str(tmp_path / "scalar"), out=str(tmp_path / "wrong")))


def test_candidates_are_blended_with_the_solvers_step(config, monkeypatch):
    """The surrogate stays where it is, so that a blend lies between the state and the solver's step."""
    run = on_policy._Run(dataclasses.replace(config, solver=1.0, refined=0.0), config.out)
    state, _ = run.pool.batch()
    solved, made = run.solver.step(state), run._candidates(state, 0)
    share = (made - state).flatten(1).norm(dim=1) / (solved - state).flatten(1).norm(dim=1)
    assert bool(((share > 0) & (share < 1)).all()) and len(set(share.tolist())) == 3
    torch.testing.assert_close(made, torch.lerp(state, solved, share.view(-1, 1, 1, 1)), rtol=1e-5, atol=1e-5)
    lost = state.clone()
    lost[0, 0] = -1.0  # the solver cannot take it; the surrogate's step stands in
    assert bool(run._candidates(lost, 0).isfinite().all())


def test_rollouts_go_on_from_the_mean_over_symmetries(config):
    run = on_policy._Run(dataclasses.replace(config, averaged=1.0), config.out)
    for p in run.model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    state, _ = run.pool.batch()
    mean = run._mean_of_frames(state, 0)
    assert not torch.allclose(mean, run._moved(state, 2), atol=1e-4)  # the network knows its orientation
    totals = (x.double().mean((2, 3)) for x in (mean, state))
    torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-5)
    run.step(0)
    kept = run.pool.time > 0
    assert bool(kept.any()) and bool(run.pool.state.isfinite().all())
    with pytest.raises(ArgumentError, match="averaged is 2"):
        dataclasses.replace(config, averaged=2.0)


def test_other_settings_in_the_same_folder_are_refused(config):
    train_on_policy(config)
    with pytest.raises(CheckpointError, match=r"seed 0, now 1.*resume=false"):
        train_on_policy(dataclasses.replace(config, seed=1))


def test_wrong_settings_are_named(config):
    with pytest.raises(ArgumentError, match=r"fm\.ckpt"):
        OnPolicyConfig()
    with pytest.raises(ArgumentError, match="refined is 2"):
        dataclasses.replace(config, refined=2.0)
    with pytest.raises(ArgumentError, match="unknown size"):
        train_on_policy(dataclasses.replace(config, model={"breadth": 3}))

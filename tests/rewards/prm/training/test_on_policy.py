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

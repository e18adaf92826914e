"""Policies trained in a world model of several tasks: frozen or further trained, what is kept, and data and models that do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import ttcfast
import ttcfast.pwm.train_policy as module
from tests.pwm.test_train_policy import AGENT, ALG, Settable, same, weights
from tests.replays import episode
from ttcfast.data.replay import ReplaySet
from ttcfast.data.replay_shard import write_shard
from ttcfast.pwm.checkpoint import load_world_model
from ttcfast.pwm.envs import EnvPool
from ttcfast.pwm.evaluation.play import play
from ttcfast.pwm.policy_config import TrainPolicyConfig
from ttcfast.pwm.train_policy import train_policy
from ttcfast.pwm.train_wm import TrainWMConfig, train_wm
from ttcfast.runtime.errors import ArgumentError, DataError

TASKS = ("still", "rotation")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(module, "make_env", lambda task, action_repeat: Settable())


def write(folder: Path, named: bool) -> Path:
    """Write six episodes of each task: a shard per task or, without names, one of all, as TD-MPC2's published ones."""
    held = [[episode(10 * number + i, task=number) for i in range(6)] for number in range(2)]
    if not named:
        write_shard(folder / "chunk.pt", [e for pair in zip(*held) for e in pair], {})
        return folder
    for number, (name, episodes) in enumerate(zip(TASKS, held)):
        write_shard(folder / f"{name}.pt", episodes, {"task": name, "number": number, "action_dim": 1})
    return folder


def train(data: Path, out: Path) -> Path:
    """Train a world model of both tasks and return its file."""
    sizes = {"steps": 4, "batch": 8, "horizon": 2, "warmup": 1, "eval_horizon": 4, "held_out": 0.2, "esnr_microbatches": 0}
    train_wm(TrainWMConfig(data=str(data), out=str(out), alg=ALG, arms=("residual",), seeds=(0,), tasks=TASKS, **sizes))
    return out / "residual_seed0" / "world_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Data of two tasks and a world model of both."""
    folder = write(tmp_path_factory.mktemp("replays"), named=True)
    return folder, train(folder, tmp_path_factory.mktemp("wm"))


@pytest.fixture
def config(trained, tmp_path) -> TrainPolicyConfig:
    sizes = {"wm_steps": 0, "steps": 4, "batch": 8, "horizon": 2, "starts": 8, "warmup": 1, "eval_horizon": 4, "held_out": 0.2}
    sizes |= {"eval_every": 2, "eval_episodes": 2, "final_episodes": 3, "esnr_microbatches": 2, "save_every": 3, "log_every": 1}
    sizes |= {"collect_every": 2, "collect_episodes": 2, "wm_updates": 1, "task": "rotation", "world_model": str(trained[1])}
    return TrainPolicyConfig(data=str(trained[0]), out=str(tmp_path / "run"), agent=AGENT, **sizes)


def test_the_policy_learns_in_the_frozen_model_of_all_tasks(config):
    found = train_policy(config)
    assert (found.task, [e.step for e in found.evaluations], found.wm_seconds) == ("rotation", [0, 2, 4], 0.0)
    assert found.errors == found.errors_before and all(-1 <= e.simulator_cosine <= 1 for e in found.evaluations)
    own, theirs = weights(config.out), load_world_model(config.world_model).model.state_dict()
    assert all(torch.equal(own[f"model.{name}"], tensor) for name, tensor in theirs.items())


def test_data_that_name_no_tasks_have_those_of_the_model(config, tmp_path):
    data = write(tmp_path / "chunks", named=False)
    unnamed = dataclasses.replace(config, data=str(data), world_model=str(train(data, tmp_path / "wm")), steps=2)
    assert train_policy(unnamed).task == "rotation"
    told = dataclasses.replace(unnamed, world_model=None, wm_steps=2, alg=ALG, resume=False)
    with pytest.raises(ArgumentError, match=r"^task is 'rotation'; .* has task-0, task-1"):
        train_policy(told)


def test_the_saved_agent_acts_and_plans_for_its_task(config):
    train_policy(config)
    agent = ttcfast.load(Path(config.out) / "agent.safetensors")
    assert agent.model.tasks == TASKS and agent.policy.task == "rotation"
    obs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    z = agent.model.encode(obs, torch.full((5,), 1))
    assert torch.equal(agent.act(obs), agent.policy.actor(z)) and not torch.equal(agent.model.encode(obs, "still"), z)
    pool = EnvPool([Settable])
    found = play(agent, pool, [0], {"method": "mppi", "horizon": 3, "samples": 8, "iterations": 1})
    assert found.rollouts.failed == 0 and found.evaluations > 0


@pytest.mark.parametrize("mode", ["online", "dmo"])
def test_own_episodes_train_the_model_on_under_the_number_of_their_task(config, mode):
    found = train_policy(dataclasses.replace(config, mode=mode, horizon=2, wm_steps=2))
    data = ReplaySet.open(Path(config.out) / "episodes")
    assert set(data.tasks().tolist()) == {1} and data.task_names()[1] == "rotation" and found.own_episodes == len(data)
    own, theirs = weights(config.out), load_world_model(config.world_model).model.state_dict()
    assert any(not torch.equal(own[f"model.{name}"], tensor) for name, tensor in theirs.items())


def test_a_killed_run_ends_as_an_unbroken_one(config, tmp_path, monkeypatch):
    unbroken = train_policy(dataclasses.replace(config, out=str(tmp_path / "unbroken")))
    step = module.PolicyRun.step

    def killed(self, at):
        if at == 3:
            raise KeyboardInterrupt
        return step(self, at)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.PolicyRun, "step", killed)
        train_policy(config)
    assert same(train_policy(config), unbroken)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": "swing"}, "^task is 'swing'; .* has still, rotation"),
        ({"arm": "mlp"}, "^arm is mlp; .*world_model.safetensors was trained as residual: give arm=residual"),
        ({"world_model": None}, "^wm_steps is 0; it must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_told(config, changes, message):
    with pytest.raises((ArgumentError, ValueError), match=message):
        train_policy(dataclasses.replace(config, **changes))


def test_data_that_the_model_was_not_made_for_are_told(config, tmp_path):
    for name, number in {"rotation": 0, "other": 1}.items():
        held = [episode(10 * number + i, task=number) for i in range(6)]
        write_shard(tmp_path / "swapped" / f"{name}.pt", held, {"task": name, "number": number, "action_dim": 1})
        wide = [episode(10 * number + i, task=number, padding=1) for i in range(6)]
        write_shard(tmp_path / "wide" / f"{name}.pt", wide, {"task": TASKS[number], "number": number, "action_dim": 1})
    with pytest.raises(DataError, match=r"the data call this task '(other|rotation)': give tasks in their order"):
        train_policy(dataclasses.replace(config, data=str(tmp_path / "swapped")))
    with pytest.raises(ArgumentError, match=r"has observations and actions of sizes .4, 1., .* of .3, 1.; give its data"):
        train_policy(dataclasses.replace(config, data=str(tmp_path / "wide")))


def test_one_task_of_a_folder_of_several_needs_no_trained_model(config):
    found = train_policy(dataclasses.replace(config, world_model=None, wm_steps=2, alg=ALG))
    agent = ttcfast.load(Path(config.out) / "agent.safetensors")
    assert found.task == "rotation" and agent.model.task_embedding is None and agent.policy.task is None

"""Training policies: what a run leaves, an exact resume, the policy's own episodes, and wrong settings."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import ttcfast
import ttcfast.pwm.train_policy as module
from tests.replays import earn, episode, move
from ttcfast.data.replay import ReplaySet
from ttcfast.data.replay_shard import write_shard
from ttcfast.pwm import PWM
from ttcfast.pwm.checkpoint import load_world_model
from ttcfast.pwm.policy_config import TrainPolicyConfig
from ttcfast.pwm.policy_result import PolicyResult, read_result
from ttcfast.pwm.train_policy import train_policy
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError
from ttcfast.runtime.logs import read_log

ALG = {
    "model": {"_target_": "ttcfast.pwm.models.world_model.MLPWorldModel", "latent_dim": 8, "units": [16, 16], "encoder_units": [16]},
    "parity": {"tolerance": 0.2, "on_violation": "warn"},
    "wm": {"lr": 3e-3},
}
ALG["model"] |= {"num_bins": 21, "encoder": {"last_layer": "linear"}, "standardise": True}
AGENT = {"actor": {"units": [16]}, "critic": {"units": [16]}, "critic_passes": 1, "horizon": 3}


class Rotation:
    """The system of ``tests.replays`` as an environment; it fails in episodes whose random seed is in ``failing``."""

    name, observation_dim, action_dim, episode_length = "rotation", 3, 1, 12
    failing: frozenset[int] = frozenset()

    def reset(self, seed: int):
        self.seed, self.left = seed, self.episode_length
        self.x = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        return self.x.numpy()

    def step(self, action):
        a = torch.as_tensor(action, dtype=torch.float32)
        self.left -= 1
        if self.seed in self.failing and self.left == 3:
            raise RuntimeError("the simulator has diverged")
        reward, self.x = float(earn(self.x, a)), move(self.x, a)
        return self.x.numpy(), reward, self.left == 0


class Settable(Rotation):
    def state(self):
        return self.x.double().numpy()

    def set_state(self, state):
        self.x = torch.from_numpy(state).float()
        return self.x.numpy()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(module, "make_env", lambda task, action_repeat: Rotation())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replays")
    write_shard(folder / "a.pt", [episode(i) for i in range(8)], {"task": "rotation", "number": 0, "action_dim": 1})
    return folder


@pytest.fixture
def config(data, tmp_path) -> TrainPolicyConfig:
    sizes = {"wm_steps": 4, "steps": 4, "batch": 8, "horizon": 2, "starts": 8, "warmup": 1, "eval_horizon": 4, "held_out": 0.2}
    sizes |= {"eval_every": 2, "eval_episodes": 2, "final_episodes": 3, "esnr_microbatches": 2, "save_every": 3, "log_every": 1}
    sizes |= {"collect_every": 2, "collect_episodes": 2, "wm_updates": 1}
    return TrainPolicyConfig(data=str(data), out=str(tmp_path / "run"), alg=ALG, agent=AGENT, **sizes)


def weights(out: str | Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(Path(out) / "agent.safetensors")[0]


def timeless(found: PolicyResult) -> PolicyResult:
    evaluations = tuple(dataclasses.replace(e, seconds=0.0, cpu_seconds=0.0) for e in found.evaluations)
    return dataclasses.replace(found, evaluations=evaluations, wm_seconds=0.0, policy_seconds=0.0, cpu_seconds=0.0)


def same(one: PolicyResult, two: PolicyResult) -> bool:
    return repr(timeless(one)) == repr(timeless(two))  # NaN equals NaN in words


@pytest.mark.parametrize("arm", ["mlp", "residual", "heun1"])
def test_a_run_reports_what_it_did_and_is_not_repeated(config, arm):
    config = dataclasses.replace(config, arm=arm)
    found = train_policy(config)
    assert [e.step for e in found.evaluations] == [0, 2, 4] and [len(e.returns) for e in found.evaluations] == [2, 2, 3]
    assert (found.task, found.arm, found.own_episodes, found.failed, found.stopped) == ("rotation", arm, 0, 0, False)
    per_loss = {"mlp": 2, "residual": 2, "heun1": 2 + 2}[arm]  # a flow rolls out one step of two, and its loss asks once per step
    per_step = 2 if arm == "heun1" else 1
    assert found.field_evaluations == 4 * per_loss + 4 * 3 * per_step
    written = (Path(config.out) / "result.json").stat().st_mtime_ns
    assert same(train_policy(config), found) and (Path(config.out) / "result.json").stat().st_mtime_ns == written


def test_evaluations_keep_their_time_and_the_gradients_since_the_last(config):
    found = train_policy(config)
    wall, cpu = ([getattr(e, name) for e in found.evaluations] for name in ("seconds", "cpu_seconds"))
    assert found.wm_seconds <= wall[0] < wall[1] < wall[2] == pytest.approx(found.wm_seconds + found.policy_seconds)
    assert 0 < cpu[0] < cpu[1] < cpu[2] == found.cpu_seconds and found.device == "cpu"
    logged = [entry["actor_gradient_norm"] for entry in read_log(Path(config.out)) if "actor_gradient_norm" in entry]
    norms = [e.gradient_norm for e in found.evaluations]
    assert math.isnan(norms[0]) and norms[1:] == pytest.approx([sum(logged[:2]) / 2, sum(logged[2:]) / 2]) and len(logged) == 4


def test_results_that_keep_less_are_read(config):
    train_policy(config)
    path = Path(config.out) / "result.json"
    held = json.loads(path.read_text())
    del held["result"]["device"]
    for evaluation in held["result"]["evaluations"]:
        for name in ("gradient_norm", "seconds", "cpu_seconds"):
            del evaluation[name]
    path.write_text(json.dumps(held))
    found = train_policy(config)
    assert found.device == "cpu" and all(math.isnan(e.gradient_norm + e.seconds + e.cpu_seconds) for e in found.evaluations)


def test_the_checkpoint_acts_like_the_trained_policy(config):
    found = train_policy(config)
    agent = ttcfast.load(Path(config.out) / "agent.safetensors")
    assert isinstance(agent, PWM)
    env, total = Rotation(), []
    for seed in range(config.eval_seed + 1000, config.eval_seed + 1003):
        obs, rewards, over = env.reset(seed), [], False
        while not over:
            obs, reward, over = env.step(agent.act(torch.from_numpy(obs)[None])[0].numpy())
            rewards.append(reward)
        total.append(sum(rewards))
    assert found.evaluations[-1].returns == pytest.approx(total, abs=1e-4)
    with pytest.raises(CheckpointError, match="agent"):
        load_world_model(Path(config.out) / "agent.safetensors")


@pytest.mark.parametrize("mode", ["offline", "online", "dmo"])
@pytest.mark.parametrize("killed_at", [2, 7])
def test_a_killed_run_ends_as_an_unbroken_one(config, tmp_path, monkeypatch, mode, killed_at):
    config = dataclasses.replace(config, mode=mode)
    unbroken = train_policy(dataclasses.replace(config, out=str(tmp_path / "unbroken")))

    class Killed(Exception):
        pass

    step = module.PolicyRun.step

    def dies(run, at):
        if at == killed_at:
            raise Killed
        return step(run, at)

    monkeypatch.setattr(module.PolicyRun, "step", dies)
    with pytest.raises(Killed):
        train_policy(config)
    monkeypatch.setattr(module.PolicyRun, "step", step)
    assert same(train_policy(config), unbroken)
    found, expected = weights(config.out), weights(tmp_path / "unbroken")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_in_dmo_rollouts_of_the_simulator_are_trained_on(config):
    found = train_policy(dataclasses.replace(config, mode="dmo", first_share=0.0))
    # Eight episodes, of which the first are cut after 1, 3, 4, 6, 7, 9, 10 and 12 steps; four updates of three steps each.
    assert found.environment_steps == 4 * 8 * 3 - (2 + 0 + 2 + 0 + 2) - (0 + 0 + 2 + 0)
    own = ReplaySet.open(Path(config.out) / "episodes")
    assert own.lengths().unique().tolist() == [3] and found.own_episodes == len(own) > 0 and found.failed == 0
    assert found.errors != found.errors_before and found.field_evaluations == (4 + 4) * 2 + 4 * 3
    initial, *later = found.evaluations
    assert math.isnan(initial.esnr_db)  # no rollout yet
    assert all(math.isfinite(e.esnr_db) and 0 <= e.saturation <= 1 for e in later)


def test_in_dmo_the_world_model_can_stay_as_it_is(config):
    found = train_policy(dataclasses.replace(config, mode="dmo", wm_updates=0, horizon=4))  # longer than rollouts
    assert found.errors == found.errors_before and found.own_episodes == 0 and found.environment_steps > 0
    assert not (Path(config.out) / "episodes").exists() and found.field_evaluations == 4 * 4 + 4 * 3


def test_in_dmo_a_rollout_whose_simulator_fails_is_dropped_and_counted(config, monkeypatch):
    monkeypatch.setattr(Rotation, "failing", frozenset({config.eval_seed + 10_007, config.eval_seed + 1000}))
    found = train_policy(dataclasses.replace(config, mode="dmo"))
    assert found.failed == 2 and [len(e.returns) for e in found.evaluations] == [2, 2, 2]


def test_measurements_along_an_episode_change_no_bit_of_the_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "make_env", lambda task, action_repeat: Settable())
    without, settings = str(tmp_path / "without"), {"wm_steps": 20, "mode": "dmo"}
    found = train_policy(dataclasses.replace(config, gradient_states=5, **settings))
    other = train_policy(dataclasses.replace(config, gradient_states=0, out=without, **settings))
    assert all(torch.equal(tensor, weights(without)[name]) for name, tensor in weights(config.out).items())
    names = ("simulator_cosine", "dynamics_lipschitz", "reward_lipschitz", "action_sensitivity")
    assert all(math.isfinite(getattr(e, name)) for e in found.evaluations for name in names)
    assert all(math.isnan(getattr(e, name)) for e in other.evaluations for name in names)
    assert [e.saturation for e in found.evaluations] == [e.saturation for e in other.evaluations]
    log = (Path(config.out) / "log.jsonl").read_text()
    assert all(f'"valid/{name}"' in log for name in (*names, "saturation"))
    again = train_policy(dataclasses.replace(config, gradient_states=3, **settings))
    assert same(again, found), "a finished run is read, whatever is measured"


def test_results_of_earlier_versions_are_read(config):
    found = train_policy(config)
    path = Path(config.out) / "result.json"
    held = json.loads(path.read_text())
    del held["result"]["environment_steps"]
    for evaluation in held["result"]["evaluations"]:
        for name in ("simulator_cosine", "dynamics_lipschitz", "reward_lipschitz", "action_sensitivity", "saturation"):
            del evaluation[name]
    path.write_text(json.dumps(held))
    read = read_result(path)
    assert read.environment_steps is None and found.environment_steps == 0
    assert math.isnan(read.evaluations[0].saturation) and read.evaluations[0].returns == found.evaluations[0].returns


def test_online_episodes_are_kept_and_trained_on(config):
    found = train_policy(dataclasses.replace(config, mode="online", first_share=0.0))
    own = ReplaySet.open(Path(config.out) / "episodes")
    assert found.own_episodes == len(own) == 4 and found.mode == "online" and found.environment_steps == 4 * 12
    assert found.field_evaluations == (4 + 4) * 2 + 4 * 3  # the residual model
    assert found.errors != found.errors_before


def test_an_episode_whose_simulator_fails_is_dropped_and_counted(config, monkeypatch):
    first = config.eval_seed + 10_000
    monkeypatch.setattr(Rotation, "failing", frozenset({first, config.eval_seed}))
    found = train_policy(dataclasses.replace(config, mode="online"))
    assert found.own_episodes == 3 and found.failed == 3
    assert [len(e.returns) for e in found.evaluations] == [1, 1, 3]


def test_arms_of_one_seed_begin_with_the_same_policy(config, tmp_path):
    still = {**AGENT, "actor_lr": 0.0, "critic_lr": 0.0}
    one, two = (dataclasses.replace(config, arm=arm, agent=still, out=str(tmp_path / arm)) for arm in ("mlp", "heun1"))
    train_policy(one), train_policy(two)
    first, second = weights(one.out), weights(two.out)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items() if name.startswith(("actor", "critic")))


def test_other_settings_refuse_to_resume(config):
    train_policy(config)
    with pytest.raises(CheckpointError, match=r"seed 0, now 1"):
        train_policy(dataclasses.replace(config, seed=1))
    assert train_policy(dataclasses.replace(config, seed=1, resume=False)).seed == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "live"}, "mode"),
        ({"mode": "dmo", "horizon": 4}, "horizon is 4 and agent.horizon 3; in dmo .*or wm_updates=0"),
        ({"mode": "dmo", "agent": {**AGENT, "horizon": 13}}, "agent.horizon is 13; an episode of rotation has 12 steps"),
        ({"gradient_states": -1}, "gradient_states is -1"),
        ({"arm": "rk4"}, "arms is 'rk4'"),
        ({"starts": 9}, "esnr_microbatches is 2 and starts 9"),
        ({"first_share": 1.5}, "first_share is 1.5"),
        ({"agent": {"gama": 0.9}}, "agent is .*'gama'.*its keys are horizon, gamma"),
        ({"horizon": 41}, "^horizon is 41; the longest of the 6 episodes of .* that are trained on has 40 steps: give at most that"),
        ({"eval_horizon": 41}, "eval_horizon is 41; the longest of the 2 episodes of .* that are held out has 40 steps"),
        ({"alg": {}}, "alg is {}"),
    ],
)
def test_settings_that_do_not_fit_are_told(config, changes, message):
    with pytest.raises((ArgumentError, ValueError), match=message):
        train_policy(dataclasses.replace(config, **changes))


def test_data_of_two_tasks_or_other_sizes_are_told(config, data, tmp_path):
    for name in ("one", "other"):
        write_shard(tmp_path / "mixed" / f"{name}.pt", [episode(9)] * 4, {"task": name, "number": name == "other", "action_dim": 1})
    with pytest.raises(ArgumentError, match="with shards of one, other; give a folder of one named task"):
        train_policy(dataclasses.replace(config, data=str(tmp_path / "mixed")))
    wide = tmp_path / "wide"
    write_shard(wide / "a.pt", [episode(i) for i in range(8)], {"task": "rotation", "number": 0})
    narrow = type("Narrow", (Rotation,), {"observation_dim": 4})
    with pytest.raises(ArgumentError, match="observation_dim is 3; rotation has 4"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_env", lambda task, action_repeat: narrow())
        train_policy(dataclasses.replace(config, data=str(wide)))

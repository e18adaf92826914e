"""Collecting: what is recorded is what happened, a killed run goes on with the same content, tasks are padded, settings are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pwm.envs.points import Point
from tests.simulators import needs_dm_control
from ttcfast.data.replay import ReplaySampler, ReplaySet
from ttcfast.data.replay_shard import ReplayShard
from ttcfast.pwm import recording
from ttcfast.pwm.collect import CollectConfig, collect
from ttcfast.pwm.envs import DMControlEnv
from ttcfast.runtime.errors import ArgumentError, DataError, OutputError

SMALL = {"episodes": 4, "per_shard": 2, "action_repeat": 10, "controllers": {"random": 1, "swingup": 1}}


def record(out, **changes):
    return collect(CollectConfig(out=str(out), **{**SMALL, **changes}))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded")
    return out, record(out)


@needs_dm_control
def test_the_recorded_actions_give_the_recorded_episode(recorded):
    """Played again in a fresh simulator: every observation and reward, so none is shifted by a step."""
    out, _ = recorded
    env = DMControlEnv("cartpole-swingup", action_repeat=10)
    for episode in (ReplaySet.open(out)[i] for i in range(2)):
        env.reset(0)
        x, cosine, sine, speed, omega = episode.obs[0].double().tolist()
        with env.physics.reset_context():
            env.physics.set_state(np.array([x, np.arctan2(sine, cosine), speed, omega]))
        for t in range(10):
            observation, reward, _ = env.step(episode.act[t].numpy())
            assert observation == pytest.approx(episode.obs[t + 1].numpy(), abs=1e-4)
            assert reward == pytest.approx(float(episode.rew[t]), abs=1e-4)


@needs_dm_control
def test_controllers_take_turns_and_their_settings_are_kept(recorded):
    _, result = recorded
    for file in result.files:
        used = ReplayShard(file).parameters["controllers_used"]
        assert [settings["controller"] for settings in used] == ["random", "swingup"]
        assert 0 <= used[1]["noise"] <= 2
    assert {key: len(found) for key, found in result.returns.items()} == {
        ("cartpole-swingup", "random"): 2,
        ("cartpole-swingup", "swingup"): 2,
    }
    assert result.steps == 4 * 100 and all(((found > 0) & (found <= 1000)).all() for found in result.returns.values())


@needs_dm_control
def test_a_killed_run_goes_on_with_the_same_content(recorded, tmp_path):
    """Whatever was recorded before an episode in the same simulator, and however the episodes are put into files."""
    whole = ReplaySet.open(recorded[0])
    record(tmp_path, per_shard=4)
    together = ReplaySet.open(tmp_path)
    (tmp_path / "cartpole-swingup_0000.pt").unlink()
    files = record(tmp_path).files
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    record(tmp_path)
    assert files[0].stat().st_mtime_ns == kept
    again = ReplaySet.open(tmp_path)
    for i in range(4):
        for other in (together, again):
            assert torch.equal(whole[i].obs, other[i].obs) and torch.equal(whole[i].act, other[i].act)


@needs_dm_control
def test_another_seed_is_another_data_set_and_other_settings_in_the_same_place_are_refused(recorded, tmp_path):
    out, _ = recorded
    record(tmp_path, episodes=1, per_shard=1, seed=1)
    assert not torch.equal(ReplaySet.open(tmp_path)[0].act, ReplaySet.open(out)[0].act)
    with pytest.raises(DataError, match=r"swingup_0000\.pt was made with other settings \(seed 0 instead of 1\); give another out="):
        record(out, seed=1)


@needs_dm_control
def test_several_tasks_are_padded_to_the_largest(tmp_path):
    tasks = ("cartpole-swingup", "reacher-easy")
    record(tmp_path, tasks=tasks, episodes=1, controllers={"random": 1})
    data = ReplaySet.open(tmp_path)
    assert (len(data), data.observation_dim, data.action_dim, data.tasks().tolist()) == (2, 6, 2, [0, 1])
    cartpole, reacher = data[0], data[1]
    assert not cartpole.obs[:, 5:].any() and not cartpole.act[:, 1:].any() and reacher.act[:, 1].any()
    alone = tmp_path / "alone"
    record(alone, episodes=1, controllers={"random": 1})
    assert torch.equal(ReplaySet.open(alone)[0].obs, cartpole.obs[:, :5]), "a task's episodes do not depend on the others"
    with pytest.raises(ArgumentError, match=r"controllers names swingup, .* and reacher-easy is none; leave controllers out"):
        record(tmp_path / "wrong", tasks=tasks)


@needs_dm_control
def test_without_controllers_each_task_has_its_own(tmp_path):
    tasks = ("cartpole-swingup", "finger-spin")
    result = record(tmp_path, tasks=tasks, controllers=None, action_repeat=50)
    assert {key: len(found) for key, found in result.returns.items()} == {
        ("cartpole-swingup", "random"): 1,
        ("cartpole-swingup", "swingup"): 3,
        ("finger-spin", "random"): 4,
    }
    chosen = record(tmp_path / "chosen", tasks=tasks[:1], controllers={"random": 0.25, "swingup": 0.75}, action_repeat=50)
    alone = record(tmp_path / "alone", tasks=tasks[:1], controllers=None, action_repeat=50)
    assert [file.read_bytes() for file in alone.files] == [file.read_bytes() for file in chosen.files]


@needs_dm_control
def test_exploring_episodes_are_short_and_in_shards_of_their_own(recorded, tmp_path):
    result = record(tmp_path, exploring=3, exploring_steps=7)
    shards = [ReplayShard(file) for file in result.files]
    assert [(len(s), s.length) for s in shards] == [(2, 100), (2, 100), (2, 7), (1, 7)]
    assert result.steps == 4 * 100 + 3 * 7 and len(result.returns["cartpole-swingup", "exploring"]) == 3
    data = ReplaySet(shards)
    assert data.lengths().tolist() == [100] * 4 + [7] * 3
    starts = torch.stack([data[i].obs[0] for i in range(4, 7)])
    assert starts[:, 0].abs().max() > 0.3 and starts[:, 3:].abs().min() > 0, "unlike the task's own, at rest near the middle"
    assert ReplaySampler(data, 7).batch(0, 64).obs.shape == (8, 64, 5)
    assert len(ReplaySampler(data, 7)) == 4 * 94 + 3 and len(ReplaySampler(data, 8)) == 4 * 93


class Breaking(Point):
    """A point whose episodes 1 and 2 (by number of resets) fail in the two ways that simulators do."""

    def reset(self, seed: int) -> np.ndarray:
        self.episode = getattr(self, "episode", -1) + 1
        self._fails, self._seeds = {1: "raise", 2: "nan"}.get(self.episode, ""), (seed,)
        return super().reset(seed)


@pytest.fixture
def breaking(monkeypatch):
    monkeypatch.setattr(recording, "make_env", lambda task, **options: Breaking())
    monkeypatch.setattr("ttcfast.pwm.collect.make_env", lambda task, **options: Breaking())
    monkeypatch.setattr("ttcfast.pwm.collect.versions", lambda task: {"point": "1"})


def test_an_episode_in_which_the_simulator_fails_is_left_out_and_counted(breaking, tmp_path):
    for _ in range(2):  # recorded, and found
        result = record(tmp_path, controllers={"random": 1}, per_shard=4)
        assert result.failures == {
            "cartpole-swingup_0000.pt, episode 1": "point raised FloatingPointError: the simulation blew up, at step 2",
            "cartpole-swingup_0000.pt, episode 2": "point returned an observation or a reward that is not finite",
        }
        data = ReplaySet.open(tmp_path)
        assert len(data) == 2 and data.lengths().tolist() == [5, 5] and result.steps == 10
        assert len(result.returns["cartpole-swingup", "random"]) == 2


def test_a_shard_without_any_episode_is_not_written(breaking, tmp_path):
    with pytest.raises(DataError, match=r"no episode of .*swingup_0001\.pt could be recorded: point raised"):
        record(tmp_path, controllers={"random": 1}, per_shard=1)
    assert [file.name for file in tmp_path.glob("*.pt")] == ["cartpole-swingup_0000.pt"]


def test_a_task_of_gymnasium_is_recorded(tmp_path):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed; pip install 'ttcfast[gym]' brings it")
    result = record(tmp_path, tasks=("gymnasium:Pendulum-v1",), episodes=1, controllers={"random": 1})
    assert [file.name for file in result.files] == ["gymnasium_Pendulum-v1_0000.pt"]
    shard = ReplayShard(result.files[0])
    assert (shard.length, shard.observation_dim, shard.action_dim) == (20, 3, 1)
    assert shard.parameters["versions"].keys() == {"gymnasium"} and ReplaySet([shard]).task_names() == ["gymnasium:Pendulum-v1"]
    with pytest.raises(ArgumentError, match="gymnasium:Pendulum-v1 does not allow; set exploring=0"):
        record(tmp_path, tasks=("gymnasium:Pendulum-v1",), exploring=1, controllers={"random": 1})
    with pytest.raises(ArgumentError, match="gymnasium:Pendulum-v1 is none; leave controllers out"):
        record(tmp_path, tasks=("gymnasium:Pendulum-v1",))


@needs_dm_control
def test_exploring_steps_beyond_an_episode_are_told(tmp_path):
    with pytest.raises(ArgumentError, match="exploring_steps is 101; an episode of cartpole-swingup has 100 steps"):
        record(tmp_path, exploring=1, exploring_steps=101)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exploring": -1}, "exploring is -1"),
        ({"processes": 0.5}, "processes is 0.5; give a whole number"),
        ({"tasks": ()}, r"tasks is \[\]; give at least one"),
        ({"tasks": ("cartpole-swingup", "cartpole-swingup")}, "each once"),
        ({"tasks": ("cartpole",)}, "tasks is 'cartpole'; it must be one of .*'cartpole-swingup'"),
        ({"episodes": 0}, "episodes is 0"),
        ({"noise": (0.5,)}, r"noise is \[0.5\]; give \[low, high\]"),
        ({"controllers": {"expert": 1}}, "controllers is 'expert'; it must be one of 'random', 'swingup'"),
        ({"controllers": {"random": -1}}, "controllers.random is -1; give a number that is not negative"),
        ({"controllers": {"random": 0.0}}, "at least one must have a share above 0"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        CollectConfig(**{**SMALL, **change})


def test_an_unwritable_place_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        record(tmp_path / "file" / "below")

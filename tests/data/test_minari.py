"""Minari data sets: read as episodes with actions in [-1, 1], of any lengths; what is damaged or cannot be used is told."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from ttcfast.data.minari import ABSORBING, open_minari
from ttcfast.data.replay import ReplaySampler, ReplaySet
from ttcfast.data.replay_shard import write_shard
from ttcfast.runtime.errors import DataError

BOX = {"type": "Box", "dtype": "float32", "shape": [2], "low": [-2.0, 0.0], "high": [2.0, 10.0]}
SEEN = {"type": "Box", "dtype": "float32", "shape": [3], "low": [-9.0] * 3, "high": [9.0] * 3}


def values(seed: int, steps: int) -> dict[str, Any]:
    """What Minari holds of an episode that was cut off; the second action leads from 0 to 10."""
    random = np.random.default_rng(seed)
    act = random.uniform([-2, 0], [2, 10], (steps, 2)).astype(np.float32)
    obs = random.standard_normal((steps + 1, 3)).astype(np.float32)
    return {"observations": obs, "actions": act, "rewards": random.standard_normal(steps), "terminations": np.zeros(steps, bool)}


def write(folder: Path, episodes: list[dict[str, Any]], **metadata: Any) -> Path:
    """A data set as release 0.5 of the package lays it out."""
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for i, episode in enumerate(episodes):
            group = file.create_group(f"episode_{i}")
            for name, held in episode.items():
                if isinstance(held, dict):
                    for key, part in held.items():
                        group[f"{name}/{key}"] = part
                else:
                    group[name] = held
            group.create_group("infos")
    spaces = {"observation_space": SEEN, "action_space": BOX, "env_spec": {"id": "Tank-v0"}} | metadata
    told = {name: json.dumps(space) for name, space in spaces.items() if space is not None}
    (folder / "data" / "metadata.json").write_text(json.dumps({"total_episodes": len(episodes), "dataset_id": "tank/r-v0", **told}))
    return folder


@pytest.fixture
def tank(tmp_path) -> Path:
    return write(tmp_path / "tank", [values(i, steps) for i, steps in enumerate((5, 7, 5))])


def test_episodes_are_read_with_actions_scaled_to_their_bounds(tank):
    data = ReplaySet.open(tank)
    assert data.lengths().tolist() == [5, 5, 7] and data.task_names() == ["gymnasium:Tank-v0"]
    assert data.shards[0].parameters == {"task": "gymnasium:Tank-v0", "number": 0, "action_dim": 2, "minari": "tank/r-v0"}
    for i, seed in enumerate((0, 2, 1)):
        found, wanted = data[i], values(seed, len(data[i].act))
        assert torch.equal(found.obs, torch.from_numpy(wanted["observations"]))
        assert found.act.numpy() * [2, 5] + [0, 5] == pytest.approx(wanted["actions"], abs=1e-5)
        assert found.rew.numpy() == pytest.approx(wanted["rewards"])
    assert all(len(ReplaySet.open(place)) == 3 for place in (tank / "data", tank / "data" / "main_data.hdf5"))


def test_windows_of_several_lengths_of_episodes(tank):
    sampler = ReplaySampler(ReplaySet.open(tank), 6)
    assert len(sampler) == 2, "only the longest episode holds any"
    long = values(1, 7)
    windows = sampler.batch(0, 20)
    assert windows.obs.shape == (7, 20, 3) and set(windows.rew[0, :, 0].tolist()) == set(long["rewards"][:2].astype(np.float32).tolist())
    with pytest.raises(ValueError, match="horizon is 8; the longest episode has 7 steps"):
        ReplaySampler(ReplaySet.open(tank), 8)


def test_a_set_survives_pickling_and_reads_again(tank):
    data = ReplaySet.open(tank)
    held = pickle.dumps(data)
    assert torch.equal(pickle.loads(held)[2].obs, data[2].obs) and torch.equal(pickle.loads(held)[1].act, data[1].act)


def test_an_episode_that_terminated_goes_on_in_an_absorbing_state(tmp_path):
    ended = values(3, 4)
    ended["terminations"][-1] = True
    (shard,) = open_minari(write(tmp_path / "tank", [ended]))
    episode = shard.episode(0)
    assert shard.length == 4 + ABSORBING
    assert (episode.obs[4:] == episode.obs[4]).all() and not episode.rew[4:].any() and episode.rew[:4].all()
    assert torch.equal(episode.act[4:8], episode.act[:4])


def test_joined_observations_are_in_the_order_of_their_space(tmp_path):
    one = {**values(0, 4), "observations": {"z": np.full((5, 1, 2), 1.0), "a": np.full(5, 2, np.uint8)}}
    part = {"type": "Box"}
    space = {"type": "Dict", "subspaces": {"z": part, "a": part}}
    (shard,) = open_minari(write(tmp_path / "ordered", [one], observation_space=space))
    assert shard.episode(0).obs[0].tolist() == [1, 1, 2]
    (shard,) = open_minari(write(tmp_path / "without", [one], observation_space=None))
    assert shard.episode(0).obs[0].tolist() == [2, 1, 1] and shard.observation_dim == 3
    many = {f"_index_{i}": np.full((5, 1), float(i)) for i in range(11)}
    space = {"type": "Tuple", "subspaces": [part] * 11}
    (shard,) = open_minari(write(tmp_path / "tuple", [{**one, "observations": many}], observation_space=space))
    assert shard.episode(0).obs[0].tolist() == list(range(11))


def test_spaces_of_older_releases_stand_in_the_file(tank):
    with h5py.File(tank / "data" / "main_data.hdf5", "a") as file:
        file.attrs.update({"action_space": json.dumps(BOX), "total_episodes": 3})
    newer = ReplaySet.open(tank)[0].act
    (tank / "data" / "metadata.json").unlink()
    assert torch.equal(ReplaySet.open(tank)[0].act, newer)


@pytest.mark.filterwarnings("ignore::UserWarning")  # about authors
def test_what_the_package_writes_is_read(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari", reason="minari is not installed; pip install 'ttcfast[gym]' brings it")
    spaces = pytest.importorskip("gymnasium").spaces
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    buffers = []
    for i in range(3):
        one = values(i, 4 + i)
        seen = {"p": one.pop("observations"), "q": np.zeros((5 + i, 1))}
        buffers.append(minari.data_collector.EpisodeBuffer(id=i, observations=seen, truncations=[False] * (4 + i), infos={}, **one))
    minari.create_dataset_from_buffers(
        "tank/test-v0",
        buffers,
        observation_space=spaces.Dict(p=spaces.Box(-9, 9, (3,)), q=spaces.Box(-1, 1, (1,), np.float64)),
        action_space=spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32)),
        data_format="hdf5",
    )
    data = ReplaySet.open(tmp_path / "tank" / "test-v0")
    assert data.lengths().tolist() == [4, 5, 6] and data.shards[0].parameters["minari"] == "tank/test-v0"
    for i in range(3):
        wanted = values(i, 4 + i)
        assert data[i].obs.numpy() == pytest.approx(np.hstack([wanted["observations"], np.zeros((5 + i, 1))]))
        assert data[i].act.numpy() * [2, 5] + [0, 5] == pytest.approx(wanted["actions"], abs=1e-5)


def edit(change: Callable[[h5py.File], Any]) -> Callable[[Path], None]:
    def done(folder: Path) -> None:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            change(file)

    return done


def put(file: h5py.File, name: str, held: Any) -> None:
    del file[name]
    file[name] = held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: put(f, "episode_1/actions", np.zeros((6, 2))), r"in episode_1: 8 observations, 6 actions, 7 rewards and 7 terminations"),
        (lambda f: put(f, "episode_1/actions", np.zeros((7, 1))), "in episode_1: actions have 1 entries, action_space 2"),
        (
            lambda f: put(f, "episode_1/observations", np.zeros((8, 4))),
            r"episode_1 has observations and actions of sizes \(4, 2\), not \(3, 2\)",
        ),
        (lambda f: put(f, "episode_2/observations", np.full((6, 3), np.nan)), "observations of episode_2 are not finite"),
        (lambda f: put(f, "episode_2/rewards", np.zeros((5, 2))), r"rewards have shape \[5, 2\]"),
        (lambda f: put(f, "episode_0/observations", np.array([b"jpeg"] * 6)), r"observations hold \|S4; only arrays of numbers"),
        (lambda f: f.__delitem__("episode_0/rewards"), "of another layout in episode_0: .*rewards"),
        (lambda f: f.__delitem__("episode_1"), "is damaged: it holds 2 episodes of 3; make or copy it again"),
        (lambda f: f.clear(), "holds no group episode_<number>"),
        (
            lambda f: put(f, "episode_0/rewards", h5py.ExternalLink("/etc/x.h5", "y")),
            "points out of itself: episode_0/rewards is an external link",
        ),
    ],
)
def test_damage_is_one_line_that_says_where(tank, change, message):
    edit(change)(tank)
    with pytest.raises(DataError, match=message) as told:
        ReplaySet.open(tank)
    assert "main_data.hdf5" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"action_space": {"type": "Discrete", "n": 2}}, "cannot be used: action_space is Discrete; only Box actions"),
        ({"action_space": {**BOX, "high": [2.0, float("inf")]}}, "action_space has no finite bounds"),
        ({"observation_space": {"type": "Discrete", "n": 2}}, "observation_space is Discrete; only Box"),
        ({"observation_space": {"type": "Dict", "subspaces": {"a": {"type": "Text"}}}}, r"observation_space\['a'\] is Text"),
        ({"action_space": None}, r"actions lie outside \[-1, 1\] and no action_space gives their bounds; add metadata\.json"),
    ],
)
def test_spaces_that_cannot_be_used_are_told(tmp_path, metadata, message):
    with pytest.raises(DataError, match=message):
        open_minari(write(tmp_path / "tank", [values(0, 4)], **metadata))


def test_another_format_a_cut_file_and_a_missing_one_are_told(tank, tmp_path):
    path = tank / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"Minari data set .*main_data\.hdf5 is empty, truncated or no HDF5 file"):
        ReplaySet.open(tank)
    path.unlink()
    (tank / "data" / "metadata.json").write_text('{"data_format": "arrow"}')
    with pytest.raises(DataError, match="in the format 'arrow'; only 'hdf5' can be read"):
        ReplaySet.open(tank)
    (tank / "data" / "metadata.json").write_text('{"data_format": ')
    with pytest.raises(DataError, match=r"metadata\.json is damaged"):
        ReplaySet.open(tank)
    with pytest.raises(DataError, match="does not exist; give the folder of a data set"):
        open_minari(tmp_path / "none.hdf5")
    with pytest.raises(DataError, match=r"no replay shard .* and no Minari data set in"):
        ReplaySet.open(tmp_path / "none")


def test_shards_that_number_tasks_differently_are_not_mixed(tmp_path):
    from tests.replays import episode

    for name, number, task in (("a", 0, "swing"), ("b", 0, "balance")):
        write_shard(tmp_path / f"{name}.pt", [episode(0)], {"number": number, "task": task})
    with pytest.raises(DataError, match=r"b\.pt holds balance as task 0, .*a\.pt swing: read them apart, or collect the tasks together"):
        ReplaySet.open(tmp_path)
    write_shard(tmp_path / "b.pt", [episode(0, task=1)], {"number": 1, "task": "swing"})
    with pytest.raises(DataError, match=r"b\.pt holds swing as task 1, .*a\.pt as task 0"):
        ReplaySet.open(tmp_path)
    write_shard(tmp_path / "b.pt", [episode(0, steps=9, task=1)], {"number": 1, "task": "balance"})
    data = ReplaySet.open(tmp_path)
    assert data.task_names() == ["swing", "balance"]
    data.require_task("swing")
    with pytest.raises(DataError, match="holds episodes of balance, swing, none of walk; give data="):
        data.require_task("walk")

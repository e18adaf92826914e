"""Replay shards: what is written is read, TD-MPC2's own files too; windows, splits and draws; errors for damaged and foreign files."""

from __future__ import annotations

import os
import pickle
import resource
import sys
from pathlib import Path

import pytest
import torch

from tests.flips import unnoticed
from ttcfast.data.replay import ReplaySampler, ReplaySet
from ttcfast.data.replay_shard import Episode, ReplayShard, write_shard
from ttcfast.runtime.errors import DataError, OutputError

PUBLISHED = Path(__file__).with_name("tdmpc2")


def episode(seed: int, steps: int = 6, size: int = 3, task: int = 0) -> Episode:
    """A sum of its actions: ``obs[t+1] = obs[t] + act[t]``, ``rew[t] = act[t].sum()``, so that a window shifted by one step is seen."""
    g = torch.Generator().manual_seed(seed)
    act = torch.rand(steps, size, generator=g) * 2 - 1
    obs = torch.cat([torch.rand(1, size, generator=g), act]).cumsum(0)
    return Episode(obs, act, act.sum(1), task)


@pytest.fixture
def shard(tmp_path) -> Path:
    write_shard(tmp_path / "a.pt", [episode(i) for i in range(4)], {"seed": 3})
    return tmp_path / "a.pt"


def dict_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_what_is_written_is_read(shard):
    read = ReplayShard(shard)
    assert (len(read), read.length, read.observation_dim, read.action_dim, read.parameters) == (4, 6, 3, 3, {"seed": 3})
    for i in range(4):
        ours, theirs = read.episode(i), episode(i)
        assert torch.equal(ours.obs, theirs.obs) and torch.equal(ours.act, theirs.act) and torch.equal(ours.rew, theirs.rew)


def test_the_file_is_in_the_layout_of_td_mpc2(shard):
    held = dict_of(shard)
    assert held["obs"].shape == (4, 7, 3) and held["action"].shape == (4, 7, 3) and held["reward"].shape == held["task"].shape == (4, 7)
    assert held["action"][:, 0].isnan().all() and held["reward"][:, 0].isnan().all()
    assert torch.allclose(held["obs"][:, 1:], held["obs"][:, :-1] + held["action"][:, 1:]), "an action stands beside where it led"


@pytest.mark.parametrize("version", ["0.2.0", "0.4.0", "0.15.3"])
def test_a_file_that_tensordict_pickled_is_read_without_tensordict(version):
    """Made by that release, as TD-MPC2 saves its buffers: ``torch.save(TensorDict({...}, batch_size=[3, 6]))``, values of seed 0."""
    read = ReplayShard(PUBLISHED / f"tensordict_{version}.pt")
    g = torch.Generator().manual_seed(0)
    obs, action, reward = torch.randn(3, 6, 4, generator=g), torch.rand(3, 6, 2, generator=g) * 2 - 1, torch.rand(3, 6, generator=g)
    assert (len(read), read.length, read.tasks().tolist(), read.parameters) == (3, 5, [0, 1, 2], {})
    for i in range(3):
        found = read.episode(i)
        assert torch.equal(found.obs, obs[i]) and torch.equal(found.act, action[i, 1:]) and torch.equal(found.rew, reward[i, 1:])
    assert "tensordict" not in sys.modules


def test_a_writer_that_dies_leaves_no_file(tmp_path, monkeypatch):
    def die(*args, **kwargs):
        raise RuntimeError("killed")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(RuntimeError, match="killed"):
        write_shard(tmp_path / "a.pt", [episode(0)], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list a process's mapped files")
def test_opening_maps_the_file_instead_of_reading_it(shard):
    read = ReplayShard(shard)
    assert str(shard) in Path("/proc/self/maps").read_text() and len(read) == 4


def test_a_set_survives_pickling(shard):
    data = ReplaySet.open(shard)
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 2000 and torch.equal(copy[2].obs, data[2].obs)


def test_a_window_is_time_first_and_in_step(shard, tmp_path):
    write_shard(tmp_path / "b.pt", [episode(9, steps=8, task=1)], {})
    data = ReplaySet.open(tmp_path)
    w = data.windows(torch.tensor([3, 4, 0]), torch.tensor([0, 5, 2]), 3)
    assert (w.obs.shape, w.act.shape, w.rew.shape, w.task.tolist()) == ((4, 3, 3), (3, 3, 3), (3, 3, 1), [0, 1, 0])
    assert torch.allclose(w.obs[1:], w.obs[:-1] + w.act) and torch.allclose(w.rew, w.act.sum(-1, keepdim=True))
    assert torch.equal(w.obs[:, 1], data[4].obs[5:9])
    with pytest.raises(IndexError, match="windows of 3 steps"):
        data.windows(torch.tensor([0]), torch.tensor([4]), 3)


def test_draws_depend_on_seed_and_step_alone(shard):
    data = ReplaySet.open(shard)
    sampler = ReplaySampler(data, 2, seed=1)
    sampler.batch(0, 5)
    assert torch.equal(sampler.batch(7, 5).obs, ReplaySampler(data, 2, seed=1).batch(7, 5).obs)
    assert not torch.equal(sampler.batch(7, 5).obs, sampler.batch(8, 5).obs)
    assert not torch.equal(sampler.batch(7, 5).obs, ReplaySampler(data, 2, seed=2).batch(7, 5).obs)


def test_every_window_is_as_likely_as_any_other(shard, tmp_path):
    """Episodes of 6, of 9 and of 2 steps; the last holds no window of 3."""
    write_shard(tmp_path / "b.pt", [episode(8, steps=9)], {})
    write_shard(tmp_path / "c.pt", [episode(9, steps=2)], {})
    sampler = ReplaySampler(ReplaySet.open(tmp_path), 3)
    assert len(sampler) == 4 * 4 + 7
    drawn = sampler.batch(0, 23_000).obs[0]
    windows, counts = drawn.unique(dim=0, return_counts=True)
    assert len(windows) == 23 and int(counts.min()) > 800 and int(counts.max()) < 1200  # 1000 +- 6 standard deviations


def test_a_split_is_by_whole_episodes(tmp_path):
    write_shard(tmp_path / "a.pt", [episode(i) for i in range(20)], {})
    train, held = ReplaySet.open(tmp_path).split(0.25, seed=5)
    assert (len(train), len(held)) == (15, 5)
    places = [set(part.episodes[:, 1].tolist()) for part in (train, held)]
    assert places[0] | places[1] == set(range(20)) and not places[0] & places[1]
    assert torch.equal(ReplaySet.open(tmp_path).split(0.25, seed=5)[1].episodes, held.episodes)
    assert not torch.equal(ReplaySet.open(tmp_path).split(0.25, seed=6)[1].episodes, held.episodes)
    assert len(ReplaySet.open(tmp_path).split(0.001)[1]) == 1
    with pytest.raises(ValueError, match="held_out is 1"):
        train.split(1)


def test_the_grid_covers_every_episode(shard):
    episodes, starts = ReplaySet.open(shard).grid(2, 2)
    assert episodes.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and starts.tolist() == [0, 2, 4] * 4


def test_tasks_and_statistics_are_those_of_the_episodes(shard, tmp_path):
    write_shard(tmp_path / "b.pt", [episode(9, steps=8, task=2)], {})
    data = ReplaySet.open(tmp_path)
    assert data.tasks().tolist() == [0, 0, 0, 0, 2] and data.lengths().tolist() == [6, 6, 6, 6, 8]
    everything = torch.cat([data[i].obs for i in range(5)]).double()
    mean, std = data.observation_statistics()
    assert torch.allclose(mean, everything.mean(0)) and torch.allclose(std, everything.std(0, correction=0))
    assert torch.allclose(data.returns(), torch.stack([data[i].rew.double().sum() for i in range(5)]))


def test_tasks_are_named_by_the_data_or_by_the_caller_and_taken_apart(tmp_path):
    write_shard(tmp_path / "mixed.pt", [episode(i, task=i % 3) for i in range(7)], {})
    write_shard(tmp_path / "third.pt", [episode(10 + i, task=2) for i in range(2)], {"task": "reach", "number": 2})
    data = ReplaySet.open(tmp_path)
    assert data.task_names() == ["task-0", "task-1", "reach"] and data.task_names(["walk", "run", "reach", "more"])[:2] == ["walk", "run"]
    alone = data.of_task(2)
    expected = [2, 5, 10, 11]  # random seeds of its episodes
    assert len(alone.shards) == 2 and all(torch.equal(alone[i].obs, episode(seed).obs) for i, seed in enumerate(expected))
    assert len(data.of_task(1).shards) == 1 and set(data.of_task(1).tasks().tolist()) == {1}
    with pytest.raises(DataError, match="holds no episode of task 3"):
        data.of_task(3)
    with pytest.raises(DataError, match=r"tasks names 2 tasks; .* has numbers up to 2: name 3"):
        data.task_names(["walk", "run"])
    with pytest.raises(DataError, match=r"tasks.2. is 'jump'; the data call this task 'reach': give tasks in their order"):
        data.task_names(["walk", "run", "jump"])


def test_damage_is_seen(shard):
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    for verify in (True, False):
        with pytest.raises(DataError, match=r"a\.pt is cut off or no \.pt file"):
            ReplayShard(shard, verify=verify)
    place = whole.index(dict_of_bytes(whole))
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(DataError, match=r"a\.pt is damaged \(the checksum of .* does not fit\)"):
        ReplayShard(shard)
    with pytest.raises(DataError, match="does not exist; make some with `ttcfast collect`"):
        ReplayShard(shard.with_name("no.pt"))
    with pytest.raises(DataError, match=r"no replay shard \(\*\.pt\)"):
        ReplaySet.open(shard.parent / "none")


def dict_of_bytes(whole: bytes) -> bytes:
    """The bytes of the first observation in the file."""
    return episode(0).obs[0].numpy().tobytes()


def test_a_value_that_is_not_finite_is_told_where_it_is_read(shard):
    held = dict_of(shard)
    held["reward"][2, 3] = torch.nan
    torch.save(held, shard)
    data = ReplaySet.open(shard)
    assert data[1].rew.isfinite().all()
    with pytest.raises(DataError, match="reward of episode 2 is not finite"):
        data[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("task"), "it holds action, meta, obs, reward; expected the tensors obs, action, reward, task"),
        (lambda d: d.update(reward=d["reward"][:, :-1]), r"reward has shape \[4, 6\], obs \[4, 7, 3\]"),
        (lambda d: d.update(obs=d["obs"].long()), "obs is torch.int64"),
        (lambda d: d.update(obs=d["obs"][0]), r"obs has shape \[7, 3\]"),
        (lambda d: d.update(action=d["action"].nan_to_num()), "row 0 has an action and a reward; there they must be NaN"),
    ],
)
def test_another_layout_is_refused_with_what_was_found(shard, change, message):
    held = dict_of(shard)
    change(held)
    torch.save(held, shard)
    with pytest.raises(DataError, match=message):
        ReplayShard(shard)


class Harmful:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"obs": Harmful()}, "a.pt")
    with pytest.raises(DataError, match="holds something other than tensors, which is not opened since that could run code"):
        ReplayShard("a.pt")
    assert not Path("ran").exists()


def test_other_files_are_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match="it holds list; expected the tensors"):
        ReplayShard(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.pt is cut off or no \.pt file"):
        ReplayShard(tmp_path / "text.pt")


def test_wrong_episodes_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="episodes is empty"):
        write_shard(tmp_path / "a.pt", [], {})
    with pytest.raises(ValueError, match=r"obs of episode 1 has shape \(6, 3\); expected \(7, 3\)"):
        write_shard(tmp_path / "a.pt", [episode(0), episode(1, steps=5)], {})
    broken = episode(0)
    broken.obs[2] = torch.inf
    with pytest.raises(ValueError, match="obs of episode 0 is not finite"):
        write_shard(tmp_path / "a.pt", [broken], {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_shard(tmp_path / "file" / "a.pt", [episode(0)], {})


def test_shards_of_other_sizes_are_not_mixed(shard, tmp_path):
    write_shard(tmp_path / "b.pt", [episode(9, size=2)], {})
    with pytest.raises(DataError, match=r"b\.pt has observations and actions of sizes \(2, 2\); .*a\.pt has \(3, 3\)"):
        ReplaySet.open(tmp_path)


def test_what_a_killed_writer_left_is_not_read(shard):
    shard.with_name(".b.1.partial.pt").write_bytes(b"half")
    assert len(ReplaySet.open(shard.parent)) == 4


def test_a_window_longer_than_every_episode_is_told(shard):
    with pytest.raises(ValueError, match="horizon is 7; the longest episode has 6 steps"):
        ReplaySampler(ReplaySet.open(shard), 7)


def test_a_relative_path_outlives_a_change_of_folder_and_upper_case_names_are_found(shard, monkeypatch):
    monkeypatch.chdir(shard.parent)
    read = ReplayShard(shard.name)
    shard.rename(shard.with_name("B.PT"))
    assert len(ReplaySet.open(shard.parent)) == 4
    shard.with_name("B.PT").rename(shard)
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(pickle.dumps(read)).episode(2).obs, episode(2).obs)


def test_episodes_declared_beyond_the_file_and_complex_ones_are_refused(shard):
    held = dict_of(shard)
    torch.save(held | {name: held[name][:1].expand(10**9, *held[name].shape[1:]) for name in ("obs", "action", "reward", "task")}, shard)
    with pytest.raises(DataError, match=r"obs has shape \[1000000000, 7, 3\] and \d+ bytes of it are there"):
        ReplayShard(shard)
    for name in ("obs", "task"):
        torch.save(held | {name: held[name].to(torch.complex64)}, shard)
        with pytest.raises(DataError, match=f"{name} is torch.complex64"):
            ReplayShard(shard)


def test_more_shards_than_descriptors(tmp_path):
    for i in range(40):
        write_shard(tmp_path / f"{i:02d}.pt", [episode(i)], {})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        read = ReplaySet.open(tmp_path)
        assert all(torch.equal(read[i].obs, episode(i).obs) for i in range(40))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_flipped_bit_is_noticed(shard):
    def everything() -> tuple:
        read = ReplayShard(shard)
        return (str(read.parameters), *(x.numpy().tobytes() for e in map(read.episode, range(len(read))) for x in (e.obs, e.act, e.rew)))

    assert unnoticed(shard, everything, 200) == []

"""The protocol: every task with every arm and seed, the same start per seed, a killed one goes on, wrong settings."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

import ttcfast.pwm.protocol as module
import ttcfast.pwm.train_policy as training
import ttcfast.pwm.train_together as module_together
from tests.replays import earn, episode, move
from ttcfast.data.replay_shard import write_shard
from ttcfast.pwm.protocol import ProtocolConfig, protocol
from ttcfast.pwm.train_policy import PolicyRun
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError, DataError, OutputError
from ttcfast.runtime.locks import run_lock

ALG = {
    "model": {"_target_": "ttcfast.pwm.models.world_model.MLPWorldModel", "latent_dim": 8, "units": [16, 16], "encoder_units": [16]},
    "parity": {"tolerance": 0.2, "on_violation": "abort"},
    "wm": {"lr": 3e-3},
}
ALG["model"] |= {"num_bins": 21, "encoder": {"last_layer": "linear"}, "standardise": True}
AGENT = {"actor": {"units": [16]}, "critic": {"units": [16]}, "critic_passes": 1, "horizon": 2}
SMALL = {"wm_steps": 4, "steps": 2, "batch": 4, "horizon": 2, "starts": 4, "warmup": 1, "eval_every": 1, "eval_episodes": 1}
SMALL |= {"final_episodes": 2, "held_out": 0.25, "eval_horizon": 4, "esnr_microbatches": 2, "save_every": 1, "log_every": 1}


class Rotation:
    """The system of ``tests.replays`` as an environment."""

    name, observation_dim, action_dim, episode_length = "rotation", 3, 1, 6

    def reset(self, seed: int):
        self.left, self.x = self.episode_length, torch.randn(3, generator=torch.Generator().manual_seed(seed))
        return self.x.numpy()

    def step(self, action):
        a = torch.as_tensor(action, dtype=torch.float32)
        self.left -= 1
        reward, self.x = float(earn(self.x, a)), move(self.x, a)
        return self.x.numpy(), reward, self.left == 0


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(training, "make_env", lambda task, action_repeat: Rotation())


def shards(folder: Path, *tasks: str) -> str:
    for task in tasks:
        write_shard(folder / f"{task}.pt", [episode(i, 12) for i in range(4)], {"task": task, "number": 0, "action_dim": 1})
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, str]:
    return tuple(shards(tmp_path_factory.mktemp(task), task) for task in ("rotation", "gymnasium:Spin-v0"))


@pytest.fixture
def config(data, tmp_path) -> ProtocolConfig:
    return ProtocolConfig(data=data[:1], out=str(tmp_path / "out"), arms=("mlp", "euler1"), seeds=(0, 1), alg=ALG, agent=AGENT, **SMALL)


def times(config: ProtocolConfig) -> dict[Path, int]:
    return {path.parent.relative_to(config.out): path.stat().st_mtime_ns for path in Path(config.out).rglob("result.json")}


def timeless(results):
    """What repeated runs share: as words, since NaN equals nothing."""
    none = {"wm_seconds": 0.0, "policy_seconds": 0.0, "cpu_seconds": 0.0}
    return [
        repr(
            dataclasses.replace(
                run, evaluations=tuple(dataclasses.replace(e, seconds=0.0, cpu_seconds=0.0) for e in run.evaluations), **none
            )
        )
        for run in results
    ]


def test_every_task_arm_and_seed_is_a_run_in_its_folder(config, data):
    found = protocol(dataclasses.replace(config, data=data, seeds=(3,)))
    tasks = ["rotation", "gymnasium:Spin-v0"]
    assert [(run.task, run.arm, run.seed) for run in found] == [(task, arm, 3) for task in tasks for arm in ("mlp", "euler1")]
    assert {str(path) for path in times(config)} == {f"{t}/{a}_seed3" for t in ("rotation", "gymnasium_Spin-v0") for a in config.arms}
    assert all(len(run.evaluations) == 3 and len(run.evaluations[-1].returns) == 2 for run in found)
    assert [run.dynamics_evaluations for run in found[:2]] == [1, 1]


def test_a_killed_protocol_goes_on_without_training_finished_runs_again(config, monkeypatch):
    config = dataclasses.replace(config, seeds=(0,))
    whole = protocol(dataclasses.replace(config, out=config.out + "_whole"))
    original, trained = PolicyRun._update_policy, []

    def killed(self, step):
        trained.append(self.arm.name)
        if len(trained) == 4:  # in the second update of the second run
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(PolicyRun, "_update_policy", killed)
    with pytest.raises(KeyboardInterrupt):
        protocol(config)
    before = times(config)
    assert set(before) == {Path("rotation/mlp_seed0")}
    resumed = protocol(config)
    assert timeless(resumed) == timeless(whole)
    assert times(config)[Path("rotation/mlp_seed0")] == before[Path("rotation/mlp_seed0")]
    assert trained == ["mlp"] * 2 + ["euler1"] * 3, "one update is repeated"


def weights(config: ProtocolConfig) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.parent.relative_to(config.out)): checkpoints.load(path)[0] for path in Path(config.out).rglob("agent.safetensors")}


def same(one: ProtocolConfig, two: ProtocolConfig) -> bool:
    """Whether the agents of two protocols have the same bits."""
    first, second = weights(one), weights(two)
    assert first and first.keys() == second.keys()
    return all(torch.equal(tensor, second[run][name]) for run, held in first.items() for name, tensor in held.items())


def test_seeds_together_end_as_one_by_one(config):
    config = dataclasses.replace(config, arms=("mlp", "heun1"), seeds=(0, 1, 5))
    apart = dataclasses.replace(config, out=config.out + "_apart", together=False)
    assert timeless(protocol(config)) == timeless(protocol(apart)) and same(config, apart)
    for path in Path(config.out).rglob("training.safetensors"):  # weights, moments and random states
        mine, theirs = (checkpoints.load(p)[0] for p in (path, Path(apart.out) / path.relative_to(config.out)))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("killed_at", [1, 3, 5])  # updates of a group: of the world model and of the policy
@pytest.mark.parametrize("finished", [(), (1,)])
def test_a_killed_group_goes_on_as_if_it_had_not_been(config, monkeypatch, killed_at, finished):
    config = dataclasses.replace(config, arms=("euler1",), seeds=(0, 1, 2), save_every=2)
    whole = dataclasses.replace(config, out=config.out + "_whole")
    expected = protocol(whole)
    if finished:
        protocol(dataclasses.replace(config, seeds=finished))
    original, made = module_together._updated, []

    def killed(*args):
        made.append(1)
        if len(made) == killed_at:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module_together, "_updated", killed)
    with pytest.raises(KeyboardInterrupt):
        protocol(config)
    assert timeless(protocol(config)) == timeless(expected) and same(config, whole)


def test_runs_that_are_not_equally_far_wait_for_the_last(config, monkeypatch):
    config = dataclasses.replace(config, arms=("residual",), seeds=(0, 1))
    whole = dataclasses.replace(config, out=config.out + "_whole", together=False)
    protocol(whole)
    step = PolicyRun.step

    def killed(self, at):
        if at == 3:
            raise KeyboardInterrupt
        return step(self, at)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PolicyRun, "step", killed)
        protocol(dataclasses.replace(config, seeds=(1,)))
    sizes = []
    original = module_together._updated
    monkeypatch.setattr(module_together, "_updated", lambda runs, *rest: sizes.append(len(runs)) or original(runs, *rest))
    protocol(config)
    assert sizes == [2] * 3 and same(config, whole)  # the first run makes three updates alone


def test_networks_that_cannot_be_stacked_train_one_after_the_other(config):
    alg = {**ALG, "model": {**ALG["model"], "encoder": {"last_layer": "simnorm", "last_layer_kwargs": {"group": 4}}}}
    config = dataclasses.replace(config, alg=alg, arms=("mlp",))
    apart = dataclasses.replace(config, out=config.out + "_apart", together=False)
    assert timeless(protocol(config)) == timeless(protocol(apart)) and same(config, apart)


def test_further_arms_join_the_finished_ones(config):
    protocol(dataclasses.replace(config, arms=("mlp",), seeds=(1,)))
    before = times(config)
    assert [(run.arm, run.seed) for run in protocol(config)] == [("mlp", 0), ("mlp", 1), ("euler1", 0), ("euler1", 1)]
    assert before.items() <= times(config).items() and len(times(config)) == 4


def test_the_actor_starts_alike_in_all_arms_of_a_seed(config, monkeypatch):
    started = {}

    def caught(self, advance):
        weights = {name: part.state_dict() for name, part in self.policy.modules().items()}
        started[self.arm.name, self.config.seed] = torch.cat([t.flatten() for part in weights.values() for t in part.values()])
        raise OutputError("seen")

    monkeypatch.setattr(PolicyRun, "updates", caught)
    for arm in ("mlp", "residual", "heun2"):
        for seed in (0, 1):
            with pytest.raises(OutputError, match="seen"):
                protocol(dataclasses.replace(config, arms=(arm,), seeds=(seed,)))
    assert torch.equal(started["mlp", 0], started["residual", 0]) and torch.equal(started["mlp", 0], started["heun2", 0])
    assert not torch.equal(started["mlp", 0], started["mlp", 1])


def test_a_run_that_another_process_trains_is_refused_and_others_are_not(config, monkeypatch):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with run_lock(f"{config.out}/rotation/mlp_seed0"):
            entered.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(60)
    try:
        with pytest.raises(OutputError, match=r"mlp_seed0: another run is writing there"):
            protocol(config)
        assert len(protocol(dataclasses.replace(config, arms=("euler1",), seeds=(0,)))) == 1
    finally:
        leave.set()
        holder.join()


def test_other_settings_in_the_same_place_are_refused(config):
    one = dataclasses.replace(config, arms=("mlp",), seeds=(0,))
    protocol(one)
    with pytest.raises(CheckpointError, match=r"other settings \(steps 2, now 3\)"):
        protocol(dataclasses.replace(one, steps=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("mlp", "heun")}, "arms is 'heun'; it must be mlp, residual, or heun or euler"),
        ({"arms": ("mlp", "mlp")}, r"arms is \['mlp', 'mlp'\]; give at least one, each once"),
        ({"seeds": ()}, r"seeds is \[\]; give at least one"),
        ({"seeds": (-1,)}, "seeds is -1"),
        ({"data": ("a", "a")}, r"data is \['a', 'a'\]"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_wrong_settings_are_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_what_does_not_fit_is_told_before_the_first_run(config, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train_policies", lambda *args: pytest.fail("a run was started"))
    again = shards(tmp_path / "again", "rotation")
    with pytest.raises(ArgumentError, match=r"data names .* and .*again, both of rotation; give one folder per task"):
        protocol(dataclasses.replace(config, data=(*data, again)))
    mixed = shards(tmp_path / "mixed", "rotation", "pendulum-swingup")
    with pytest.raises(DataError, match="read them apart"):
        protocol(dataclasses.replace(config, data=(mixed,)))
    strict = {**ALG, "parity": {"tolerance": 0.0, "on_violation": "abort"}}
    with pytest.raises(ValueError, match="more than the tolerance"):
        protocol(dataclasses.replace(config, alg=strict))
    with pytest.raises(ArgumentError, match="its keys are horizon, gamma"):
        protocol(dataclasses.replace(config, agent={"discount": 0.9}))

"""Training the arms: they learn, a killed run ends as an unbroken one, what is reported is what was done, wrong settings are told."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from tests.replays import episode, write_replays
from ttcfast.data.replay_shard import write_shard
from ttcfast.pwm.algorithms import PWM
from ttcfast.pwm.arms import Arm
from ttcfast.pwm.checkpoint import load_world_model
from ttcfast.pwm.evaluation.parity import parameter_parity
from ttcfast.pwm.models import FlowWorldModel, MLPWorldModel, ResidualWorldModel
from ttcfast.pwm.train_wm import ArmResult, Comparison, Material, TrainWMConfig, train_wm
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError, DataError
from ttcfast.runtime.logs import read_log

ALG = {
    "model": {"latent_dim": 16, "units": [32, 32], "encoder_units": [32], "num_bins": 21},
    "parity": {"tolerance": 0.05, "on_violation": "warn"},
    "wm": {"lr": 3e-3, "dynamics_weight": 20.0},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_replays(tmp_path_factory.mktemp("replays"))


@pytest.fixture
def config(data, tmp_path) -> TrainWMConfig:
    sizes = {"steps": 6, "batch": 8, "horizon": 2, "warmup": 2, "eval_horizon": 4, "held_out": 0.2}
    sizes |= {"save_every": 2, "log_every": 3, "esnr_microbatches": 4}
    return TrainWMConfig(data=str(data), out=str(tmp_path / "run"), alg=ALG, arms=("heun2",), seeds=(0,), **sizes)


def weights(out: str | Path, run: str = "heun2_seed0") -> dict[str, torch.Tensor]:
    return checkpoints.load(Path(out) / run / "world_model.safetensors")[0]


def timeless(comparison: Comparison) -> list[ArmResult]:
    return [dataclasses.replace(run, seconds=0.0, cpu_seconds=0.0) for run in comparison.runs]


@pytest.mark.parametrize("arm", ["mlp", "heun2"])
def test_training_lowers_the_errors_below_persistence(config, arm):
    more = dataclasses.replace(config, arms=(arm,), steps=200, batch=16, horizon=3, warmup=10, save_every=200, log_every=200)
    found = train_wm(more)
    (run,) = found.runs
    assert run.errors.observation[-1] < 0.5 * found.persistence.observation[-1]
    assert run.errors.reward[-1] < 0.1 * found.persistence.reward[-1] and run.errors.unread < 0.15 and run.skipped == 0


def test_a_killed_run_ends_with_the_same_weights_and_errors(config, tmp_path, monkeypatch):
    both = dataclasses.replace(config, arms=("residual", "heun2"))
    whole = train_wm(both)
    broken = dataclasses.replace(both, out=str(tmp_path / "broken"))
    original, calls = PWM.update_wm, []

    def killed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 11:  # in the fifth update of the second run, behind a save
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PWM, "update_wm", killed)
    with pytest.raises(KeyboardInterrupt):
        train_wm(broken)
    first = (tmp_path / "broken" / "residual_seed0" / "result.json").stat().st_mtime_ns
    torch.manual_seed(999)  # a new process has other random states
    monkeypatch.setattr(PWM, "update_wm", original)
    resumed = train_wm(broken)
    assert timeless(resumed) == timeless(whole)
    a, b = weights(config.out), weights(broken.out)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "broken" / "residual_seed0" / "result.json").stat().st_mtime_ns == first, "a finished run is not trained again"


def test_what_is_reported_is_what_was_done(config, monkeypatch):
    calls = []
    velocity = FlowWorldModel.velocity
    monkeypatch.setattr(FlowWorldModel, "velocity", lambda *args: calls.append(args[1].shape[0]) or velocity(*args))
    found = train_wm(dataclasses.replace(config, arms=("mlp", "residual", "euler4", "heun2"), esnr_microbatches=0))
    runs = {run.arm: run for run in found.runs}
    assert {name: run.evaluations for name, run in runs.items()} == {"mlp": 1, "residual": 1, "euler4": 4, "heun2": 4}
    assert {name: run.training_evaluations for name, run in runs.items()} == {"mlp": 12, "residual": 12, "euler4": 36, "heun2": 36}
    assert sum(calls) == 2 * 6 * 2, "the loss asks for the velocity of every step once, and the rollout makes the first alone"
    for name, run in runs.items():
        model = load_world_model(Path(config.out) / f"{name}_seed0" / "world_model.safetensors").model
        parity = parameter_parity(model, tolerance=1)
        assert (run.parameters, run.parameter_gap, run.dynamics_gap) == (model.total_params, parity.gap, parity.dynamics_gap)
        assert run.base_parameters == runs["mlp"].parameters
        assert run.steps == 6 and run.cpu_seconds > 0 and run.seconds > 0
    assert runs["mlp"].parameter_gap == 0 and runs["heun2"].dynamics_parameters == runs["mlp"].dynamics_parameters + 32 - 2 * 16
    assert found.episodes == (8, 2) and found.windows == 2 * 5  # starts 0, 8, 16, 24, 32 of 40 steps


def test_esnr_of_the_logged_updates_is_logged(config):
    (run,) = train_wm(config).runs
    logged = read_log(Path(config.out) / "heun2_seed0")
    assert [entry["step"] for entry in logged] == [3, 6]
    found = [10 ** (entry["esnr_db"] / 10) for entry in logged]
    assert found == pytest.approx([entry["esnr"] for entry in logged]) and min(found) > 0
    assert min(found) < 10 ** (run.esnr_db / 10) < max(found), "smoothed over the measurements"
    without = dataclasses.replace(config, esnr_microbatches=0, resume=False)
    (run,) = train_wm(without).runs
    assert math.isnan(run.esnr_db) and "esnr" not in read_log(Path(config.out) / "heun2_seed0")[0]


def test_a_checkpoint_is_the_trained_model(config):
    train_wm(config)
    path = Path(config.out) / "heun2_seed0" / "world_model.safetensors"
    agent = load_world_model(path)
    assert isinstance(agent.model, FlowWorldModel) and (agent.model.integrator.name, agent.model.integrator.substeps) == ("heun", 2)
    assert all(torch.equal(tensor, agent.model.state_dict()[name]) for name, tensor in weights(config.out).items())
    with pytest.raises(CheckpointError, match="has architecture None"):
        load_world_model(path.with_name("training.safetensors"))


def test_runs_of_one_seed_differ_by_their_dynamics_alone(config):
    """The same initial encoder and the same first batch: what the reward head loses before the first update is the same."""
    train_wm(dataclasses.replace(config, arms=("mlp", "heun1"), steps=1, horizon=1, esnr_microbatches=0))
    first = [json.loads((Path(config.out) / f"{arm}_seed0" / "log.jsonl").read_text().splitlines()[0]) for arm in ("mlp", "heun1")]
    assert first[0]["reward"] == pytest.approx(first[1]["reward"], rel=1e-6)


def test_seeds_give_other_models(config):
    train_wm(dataclasses.replace(config, seeds=(0, 1)))
    a, b = weights(config.out), weights(config.out, "heun2_seed1")
    assert not torch.equal(a["encoder_network.last.0.weight"], b["encoder_network.last.0.weight"])


def test_several_tasks_make_one_model_of_all(config, tmp_path):
    for number, name in enumerate(("first", "second")):
        made = {"task": name, "number": number, "action_dim": 1}
        write_shard(tmp_path / f"{name}.pt", [episode(10 * number + i, task=number) for i in range(4)], made)
    found = train_wm(dataclasses.replace(config, data=str(tmp_path)))
    model = load_world_model(Path(config.out) / "heun2_seed0" / "world_model.safetensors").model
    assert model.tasks == ("first", "second") and model.task_embedding is not None and model.action_masks is not None
    assert all(map(math.isfinite, found.runs[0].errors.observation))


def test_the_sanity_checks_end_a_run_and_are_told(config):
    strict = {**ALG, "sanity": {"max_latent": 1e-9, "patience": 3}}
    (run,) = train_wm(dataclasses.replace(config, alg=strict)).runs
    assert run.stopped and run.skipped == 3 and run.steps == 3
    (again,) = train_wm(dataclasses.replace(config, alg=strict)).runs
    assert again == run


def test_other_settings_in_the_same_place_are_refused(config):
    train_wm(config)
    with pytest.raises(CheckpointError, match=r"result\.json is of a run with other settings \(batch 8, now 4\)"):
        train_wm(dataclasses.replace(config, batch=4))
    (Path(config.out) / "heun2_seed0" / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"training\.safetensors is of a run with other settings \(steps 6, now 8\)"):
        train_wm(dataclasses.replace(config, steps=8))
    train_wm(dataclasses.replace(config, steps=8, resume=False))
    (Path(config.out) / "heun2_seed0" / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"result\.json is damaged"):
        train_wm(dataclasses.replace(config, steps=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ()}, r"arms is \[\]; give at least one"),
        ({"arms": ("heun",)}, "arms is 'heun'; it must be mlp, residual, or heun or euler with its substeps"),
        ({"arms": ("heun0",)}, "arms is 'heun0'"),
        ({"seeds": (1, 1)}, r"seeds is \[1, 1\]; give at least one, each once"),
        ({"seeds": (-1,)}, "seeds is -1; it must be at least 0"),
        ({"steps": 0}, "steps is 0"),
        ({"esnr_microbatches": 1}, "esnr_microbatches is 1 and batch 8; give a divisor of the batch of at least 2, or 0"),
        ({"esnr_microbatches": 3}, "esnr_microbatches is 3 and batch 8"),
        ({"device": "gpu"}, "device is 'gpu'; give cpu, cuda or cuda:<index>"),
    ],
)
def test_wrong_settings_are_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_settings_that_do_not_fit_the_data_are_told(config, tmp_path):
    with pytest.raises(ArgumentError, match=r"eval_horizon is 41; the longest of the 2 episodes of .* that are held out has 40 steps"):
        train_wm(dataclasses.replace(config, eval_horizon=41))
    with pytest.raises(ArgumentError, match=r"alg is \{\}; give a group of ttcfast/configs/alg"):
        train_wm(dataclasses.replace(config, alg={}))
    with pytest.raises(DataError, match="make some with `ttcfast collect"):
        train_wm(dataclasses.replace(config, data=str(tmp_path / "none")))


def test_windows_come_from_the_episodes_that_are_long_enough(config, tmp_path):
    made = {"task": "rotation", "number": 0, "action_dim": 1}
    for name, steps in (("long", 40), ("short", 5)):
        write_shard(tmp_path / f"{name}.pt", [episode(i, steps) for i in range(6)], made)
    mixed = dataclasses.replace(config, data=str(tmp_path), held_out=0.5, arms=("mlp",), horizon=8, eval_horizon=16)
    material = Material(mixed.data, mixed)
    long = sum(len(material.train[i].act) == 40 for i in range(6))
    assert 0 < long < 6 and material.held_out.act.shape == (16, (6 - long) * 4, 1), "starts 0, 8, 16 and 24 of each long one"
    assert train_wm(mixed).windows == (6 - long) * 4
    few = dataclasses.replace(mixed, horizon=41)
    with pytest.raises(ArgumentError, match=r"^horizon is 41; the longest of the 6 episodes of .* that are trained on has 40 steps"):
        train_wm(few)


@pytest.mark.parametrize(
    ("name", "model", "label"),
    [
        ("mlp", MLPWorldModel, "MLP"),
        ("residual", ResidualWorldModel, "residual MLP"),
        ("euler4", FlowWorldModel, "flow, Euler K = 4"),
        ("heun12", FlowWorldModel, "flow, Heun K = 12"),
    ],
)
def test_an_arm_changes_the_dynamics_of_any_group(name, model, label):
    arm = Arm(name)
    for flow in (True, False):  # a group may be a flow's or not, and may carry the plan's switch
        made = PWM.from_config(arm.configure({**ALG, "use_flow_dynamics": flow}), observation_dim=3, action_dim=1)
        assert type(made.model) is model and made.use_flow_dynamics == (model is FlowWorldModel) and arm.label == label
    if model is FlowWorldModel:
        assert (made.model.integrator.name, made.model.integrator.substeps) == (arm.method, arm.substeps)

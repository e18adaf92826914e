"""Data, surrogate, reward and directions of different time steps or cells: every command that brings them together refuses, in one line."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

import ttcfast
from ttcfast.data import GenerateConfig, generate, open_trajectories
from ttcfast.evaluation.evaluate import Problems
from ttcfast.experiments.build_prm_data import BuildPRMDataConfig, build_prm_data
from ttcfast.experiments.ceiling import CeilingConfig, ceiling
from ttcfast.experiments.fit_directions import FitDirectionsConfig, fit_directions
from ttcfast.experiments.run_ttc import RunTTCConfig, run_ttc
from ttcfast.models import load_surrogate
from ttcfast.models.train import TrainConfig, train
from ttcfast.rewards.composition import ScorerList
from ttcfast.rewards.prm.network import PairNetwork
from ttcfast.rewards.prm.scorer import PRMScorer
from ttcfast.rewards.prm.train import DataOptions, ModelOptions, OptimOptions, SurrogateOptions, TrainPRMConfig
from ttcfast.rewards.prm.train import train as train_prm
from ttcfast.rewards.prm.training.on_policy import OnPolicyConfig, train_on_policy
from ttcfast.rewards.prm.triplets.build import TripletConfig
from ttcfast.rewards.prm.triplets.file import TripletFile
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import DataError
from ttcfast.spec import StateSpec, StochasticConfig, TTCConfig

REWARD = {"width": 8, "levels": 2, "patch": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data of time steps 0.05 and 0.1; a surrogate, a reward, triplets and directions of the first."""
    place = tmp_path_factory.mktemp("units")
    common = {"presets": ("riemann4",), "grid": 8, "frames": 5, "per_file": 4, "batch": 4}
    for name, end in (("fine", 0.2), ("coarse", 0.4)):
        for split, n in (("train", 2), ("reward", 4), ("valid", 2), ("test", 2)):
            generate(GenerateConfig(split=split, n=n, out=str(place / name), t_end=end, **common))
    sizes = {"patch": 2, "width": 16, "depth": 1, "heads": 2, "refine": 4, "dropout": 0.1}
    once = {"steps": 1, "batch": 2, "valid": 1, "val_every": 1}
    fm = train(
        TrainConfig(data=str(place / "fine"), out=str(place / "fm"), model=sizes, **{**once, "steps": 4}, lr=1e-2, warmup=0, ema=0.0)
    ).checkpoint
    train_on_policy(OnPolicyConfig(fm=str(fm), data=str(place / "fine"), out=str(place / "prm"), model=REWARD, **once))
    triplets = build_prm_data(prm_data(place, fm, "fine", place / "triplets"))
    fit_directions(FitDirectionsConfig(str(triplets), out=str(place / "directions.safetensors"), rank=1, valid=0.3))
    tensors, meta = checkpoints.load(fm)
    assert meta.pop("time_step") == pytest.approx(0.05)
    checkpoints.save(place / "old.safetensors", tensors, meta)  # as every checkpoint was before
    return place


def prm_data(place, fm, data, out):
    return BuildPRMDataConfig(str(fm), (str(place / data),), builder=TripletConfig(K=4, T_prm=2), out=str(out))


def along(place):
    return StochasticConfig(dropout=False, directions=str(place / "directions.safetensors"))


def run_config(place, out, data="coarse", fm="fm/surrogate.safetensors", **options):
    ttc = TTCConfig(branching_factor=2, use_prm="prm" in options, stochastic=options.pop("stochastic", None))
    return RunTTCConfig(str(place / fm), (str(place / data),), split="test", out=str(out), steps=1, ttc=ttc, **options)


def test_everything_made_records_its_time_step(made):
    assert load_surrogate(made / "fm" / "surrogate.safetensors").time_step == pytest.approx(0.05)
    assert load_surrogate(made / "fm" / "surrogate.safetensors").variant(compile=True).time_step == pytest.approx(0.05)
    assert load_surrogate(made / "old.safetensors").time_step is None
    assert TripletFile(made / "triplets").config["time_step"] == pytest.approx(0.05)
    network = PairNetwork.from_pretrained(made / "prm")
    assert network.info["time_step"] == pytest.approx(0.05) and network.units("x").cell_volume == pytest.approx(1 / 64)
    assert checkpoints.load(made / "directions.safetensors")[1]["time_step"] == pytest.approx(0.05)


@pytest.mark.parametrize("command", ["run_ttc", "finetuned", "ceiling", "build_prm_data", "train_prm_on_policy"])
def test_data_of_another_time_step_than_the_surrogates_are_refused(command, made, tmp_path):
    fm = made / "fm" / "surrogate.safetensors"
    with pytest.raises(
        DataError, match=r"data file .*coarse.* has time step 0\.1 and the surrogate of .*fm.* is made for 0\.05; give data"
    ):
        if command == "run_ttc":
            run_ttc(run_config(made, tmp_path), quiet=True)
        elif command == "finetuned":
            run_ttc(run_config(made, tmp_path, fm="old.safetensors", finetuned=str(fm)), quiet=True)
        elif command == "ceiling":
            ceiling(CeilingConfig(str(fm), (str(made / "coarse"),), {"dropout": {"dropout": True}}, states=(0,), out=str(tmp_path)))
        elif command == "build_prm_data":
            build_prm_data(prm_data(made, fm, "coarse", tmp_path))
        else:
            train_on_policy(OnPolicyConfig(fm=str(fm), data=str(made / "coarse"), out=str(tmp_path), model=REWARD, steps=1, valid=1))


def test_so_is_a_reward_and_so_are_directions(made, tmp_path):
    old = {"fm": "old.safetensors"}
    with pytest.raises(DataError, match=r"coarse.* has time step 0\.1 and the reward model .*prm is made for 0\.05; give the reward"):
        run_ttc(run_config(made, tmp_path, **old, prm=str(made / "prm")), quiet=True)
    with pytest.raises(DataError, match=r"coarse.* has time step 0\.1 and the reward model mine is made for 0\.05; give the reward"):
        rewards = {"mine": ScorerList([PRMScorer(made / "prm")])}
        ttcfast.evaluate(load_surrogate(made / "old.safetensors"), str(made / "coarse"), rewards, split="test", steps=1)
    model = load_surrogate(made / "old.safetensors")
    model.time_step, truth = 0.1, open_trajectories(str(made / "coarse"), split="test").stack()
    with pytest.raises(DataError, match=r"the model has time step 0\.1 and the reward model mine is made for 0\.05; give the reward"):
        ttcfast.evaluate(model, Problems(truth, model.spec, 1), {"mine": made / "prm"})
    told = r"coarse.* has time step 0\.1 and directions file .*directions\.safetensors is made for 0\.05; give directions"
    with pytest.raises(DataError, match=told):
        run_ttc(run_config(made, tmp_path, **old, stochastic=along(made)), quiet=True)
    with pytest.raises(DataError, match=told):
        sources = {"directions": dataclasses.asdict(along(made))}
        ceiling(CeilingConfig(str(made / "old.safetensors"), (str(made / "coarse"),), sources, problems=2, states=(0,), out=str(tmp_path)))
    with pytest.raises(DataError, match=told):
        build_prm_data(dataclasses.replace(prm_data(made, made / "old.safetensors", "coarse", tmp_path), stochastic=along(made)))


def test_triplets_are_held_to_their_reward_and_surrogate(made, tmp_path):
    triplets = build_prm_data(prm_data(made, made / "old.safetensors", "coarse", tmp_path / "triplets"))
    config = TrainPRMConfig(
        data=DataOptions(root=str(triplets)),
        model=ModelOptions(kind="dense", init=str(made / "prm")),
        optim=OptimOptions(steps=1, batch=2),
        out=str(tmp_path / "prm"),
    )
    with pytest.raises(DataError, match=r"triplet file .* has time step 0\.1 and model\.init .*prm is made for 0\.05"):
        train_prm(config)
    config = dataclasses.replace(config, model=ModelOptions(kind="dense", width=8, levels=2))
    assert train_prm(config).prm.info["time_step"] == pytest.approx(0.1)
    recorded = SurrogateOptions(ckpt=str(made / "fm" / "surrogate.safetensors"))
    with pytest.raises(DataError, match=r"triplet file .* has time step 0\.1 and the surrogate of .* is made for 0\.05"):
        train_prm(dataclasses.replace(config, fm=recorded, out=str(tmp_path / "other")))
    with pytest.raises(DataError, match=r"has time step 0\.1 and triplet file .* is made for 0\.05; give files of one"):
        train_prm(dataclasses.replace(config, data=DataOptions(root=(str(made / "triplets"), str(triplets))), out=str(tmp_path / "both")))


def test_a_reward_is_trained_with_the_datas_own_step_and_cell(made, tmp_path):
    common = {"fm": str(made / "old.safetensors"), "data": str(made / "coarse"), "out": str(tmp_path), "steps": 1, "batch": 2, "valid": 1}
    folder, _ = train_on_policy(OnPolicyConfig(**common, model=REWARD))
    assert PairNetwork.from_pretrained(folder).residual.dt == pytest.approx(0.1)
    for residual, told in (({"dt": 0.05, "cell": [0.125, 0.125]}, "time step 0.1"), ({"dt": 0.1, "cell": [0.1, 0.125]}, "cell volume")):
        with pytest.raises(DataError, match=f"has {told}.* and the reward model is made for"):
            train_on_policy(OnPolicyConfig(**common, model={**REWARD, "residual": residual}, resume=False))


@pytest.mark.parametrize(
    "spec, told",
    [
        (StateSpec.euler2d(cell_volume=1 / 64, gamma=5 / 3), "spec has gamma 1.66667 and the reward model .*prm is made for 1.4; give the"),
        (StateSpec.euler2d(cell_volume=1 / 64, gamma=torch.tensor([1.4, 1.2])), "spec has gamma 1.2 to 1.4 and"),
        (StateSpec.euler2d(cell_volume=1 / 256), "spec has cell volume 0.00390625 and the reward model"),
    ],
)
def test_a_reward_with_features_of_the_equations_is_not_used_on_others(spec, told, made):
    with pytest.raises(DataError, match=told):
        PRMScorer(made / "prm", spec=spec)
    PRMScorer(made / "prm", spec=StateSpec.euler2d(cell_volume=1 / 64, gamma=torch.full((3,), 1.4, dtype=torch.float64)))


def test_a_checkpoint_that_does_not_say_is_used_and_the_log_says_so(made, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ttcfast.runtime.units"):
        run_ttc(run_config(made, tmp_path, fm="old.safetensors", methods=("deterministic",), calibration=0), quiet=True)
    assert sum("old.safetensors are not compared" in m and "coarse" in m for m in caplog.messages) == 1
    assert open_trajectories(made / "coarse", split="test").times[1] == pytest.approx(0.1)

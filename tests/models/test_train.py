"""Training the surrogate: it learns, it resumes exactly, and it starts fine-tuning from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.foreign import trajectories, write_data
from tests.killed import kill_at_update
from ttcfast.data import GenerateConfig, TrajectoryFile, generate, write_well
from ttcfast.models import load_surrogate
from ttcfast.models.train import TrainConfig, TrainingError, _Run, train
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError, DataError
from ttcfast.spec import StateSpec

SIZES = {"width": 16, "depth": 1, "heads": 2, "refine": 4, "patch": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("train_data")
    common = {"out": str(out), "presets": ("riemann4",), "grid": 8, "frames": 5, "t_end": 0.2, "per_file": 4, "batch": 4}
    generate(GenerateConfig(split="train", n=4, **common))
    generate(GenerateConfig(split="valid", n=2, **common))
    return out


@pytest.fixture
def config(data, tmp_path):
    return TrainConfig(
        data=str(data), out=str(tmp_path / "run"), model=SIZES, steps=12, batch=4, warmup=2, val_every=6, save_every=6, log_every=3, valid=2
    )


def weights(path):
    return checkpoints.load(path)[0]


def test_training_lowers_the_error_below_persistence(config):
    result = train(dataclasses.replace(config, steps=150, lr=3e-3, augment=False, input_noise=0.0, val_every=150, save_every=150))
    assert result.validation["one_step_l1"] < 0.9 * result.validation["persistence_l1"]
    surrogate = load_surrogate(result.checkpoint)
    assert surrogate.deterministic(torch.rand(1, 4, 8, 8) + 1).shape == (1, 4, 8, 8)


def test_a_killed_run_ends_with_the_same_weights(config, tmp_path, monkeypatch):
    whole = train(config)
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    kill_at_update(9, lambda: train(broken), monkeypatch)  # after the save at step 6
    resumed = train(broken)
    a, b = weights(whole.checkpoint), weights(resumed.checkpoint)
    assert all(torch.equal(a[n], b[n]) for n in a)
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 12
    assert len(steps) == len([json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()])


def test_a_finished_run_started_again_changes_nothing(config):
    first = weights(train(config).checkpoint)
    again = weights(train(config).checkpoint)
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_fine_tuning_starts_from_the_checkpoint(config, tmp_path):
    base = train(config)
    tuned = train(dataclasses.replace(config, init=str(base.checkpoint), out=str(tmp_path / "tuned"), steps=1, lr=0.0, split="valid"))
    a, b = weights(base.checkpoint), weights(tuned.checkpoint)
    assert all(torch.allclose(a[n], b[n]) for n in a)
    assert checkpoints.load(base.checkpoint)[1]["normalizer"] == checkpoints.load(tuned.checkpoint)[1]["normalizer"]


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_time_ends_a_run(config, clock):
    result = train(dataclasses.replace(config, steps=10_000, max_seconds=0.5, clock=clock))
    assert 0 < result.steps < 10_000


def test_bfloat16_trains(config):
    assert all(torch.isfinite(t).all() for t in weights(train(dataclasses.replace(config, precision="bfloat16")).checkpoint).values())


def test_a_diverging_run_says_so(config):
    with pytest.raises(TrainingError, match="lower lr"):
        train(dataclasses.replace(config, lr=1e30, clip=1e30, warmup=0, loss="mse", steps=50))


def test_another_model_in_the_same_folder_is_refused(config):
    train(config)
    with pytest.raises(CheckpointError, match="another out="):
        train(dataclasses.replace(config, model={**SIZES, "width": 32}))


def test_other_settings_in_the_same_folder_are_refused(config):
    train(config)
    with pytest.raises(CheckpointError, match=r"seed 0, now 1.*resume=false"):
        train(dataclasses.replace(config, seed=1))
    fresh = train(dataclasses.replace(config, seed=1, resume=False))
    assert fresh.steps == config.steps


def test_a_run_whose_time_is_up_trains_no_further(config):
    first = train(dataclasses.replace(config, steps=10_000, max_seconds=0.5))
    again = train(dataclasses.replace(config, steps=10_000, max_seconds=0.5))
    assert again.steps == first.steps
    a, b = weights(first.checkpoint), weights(again.checkpoint)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_wrong_settings_are_named(config, tmp_path):
    with pytest.raises(ValueError, match="loss is 'l3'"):
        dataclasses.replace(config, loss="l3")
    with pytest.raises(ArgumentError, match="pushforward is 2"):
        dataclasses.replace(config, pushforward=2)
    with pytest.raises(ArgumentError, match="unknown size"):
        train(dataclasses.replace(config, model={"widht": 3}, resume=False))
    with pytest.raises(DataError, match="ttcfast generate"):
        train(dataclasses.replace(config, data=str(tmp_path / "nothing")))


def test_one_channel_is_learned(tmp_path):
    spec = StateSpec.fields("vorticity", conserved="all", spacing=(0.5, 0.5), cell_volume=0.25)
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 6), ("valid", 2)):
        first = torch.rand(n, 1, 8, 8, generator=generator)
        rolled = torch.stack([first.roll(t, -1) for t in range(4)], 1)
        write_well(tmp_path / "data" / split / "a.hdf5", rolled, [0.5 * t for t in range(4)], spec, dataset_name="a")
    result = train(TrainConfig(data=str(tmp_path), out=str(tmp_path / "run"), model=SIZES, steps=80, batch=4, lr=5e-3, warmup=2, valid=2))
    assert result.validation["one_step_l1"] < 0.9 * result.validation["persistence_l1"]
    surrogate = load_surrogate(result.checkpoint)
    assert surrogate.spec.to_meta() == TrajectoryFile(tmp_path / "data" / "train" / "a.hdf5").spec.to_meta()
    assert surrogate.deterministic(torch.rand(1, 1, 8, 8)).shape == (1, 1, 8, 8)


def test_given_channels_are_read_and_not_learned(tmp_path):
    folder = write_data(tmp_path / "data")
    result = train(TrainConfig(data=str(folder), out=str(tmp_path / "run"), model=SIZES, steps=80, batch=4, lr=5e-3, warmup=2, valid=2))
    assert result.validation["one_step_l1"] < 0.9 * result.validation["persistence_l1"]
    surrogate = load_surrogate(result.checkpoint)
    assert surrogate.spec.given == ("mask",) and float(surrogate.normalizer.delta_std[3]) == 1.0
    states = trajectories(2)[:, 0]
    assert torch.equal(surrogate.deterministic(states)[:, 3], states[:, 3])


def test_data_that_the_model_cannot_learn_are_refused(tmp_path):
    for spec, said in (
        (StateSpec.fields("u", ndim=1), "data has 1 space dimensions; train_fm's models take 2"),
        (StateSpec.fields("u", given="u"), r"data declares all its channels \(u\) as given; there is nothing to predict"),
    ):
        for split in ("train", "valid"):
            states = torch.rand(2, 4, 1, *(8,) * spec.ndim)
            write_well(tmp_path / str(spec.ndim) / split / "a.hdf5", states, range(4), spec, dataset_name="a")
        with pytest.raises(ArgumentError, match=said):
            train(TrainConfig(data=str(tmp_path / str(spec.ndim)), out=str(tmp_path / "run"), model=SIZES))


@pytest.mark.parametrize("shifts", [(-1,), (2,), (0, 0)])
def test_shifts_along_what_is_no_periodic_axis_are_refused(config, shifts):
    with pytest.raises(ArgumentError, match=r"shifts is .*; name each periodic axis of the data at most once: 0, 1"):
        train(dataclasses.replace(config, shifts=shifts))


def test_settings_of_runs_before_there_were_other_models_stay_the_same(config):
    assert not {"architecture", "fno", "shifts"} & set(_Run(config, Path(config.out)).settings())
    assert "shifts" in _Run(dataclasses.replace(config, shifts=(0,)), Path(config.out)).settings()

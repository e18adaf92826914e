import csv
import json
import sys

import matplotlib.image
import numpy as np
import pytest
import torch

from ttcfast.runtime.errors import MissingPackageError
from ttcfast.runtime.locks import NAME
from ttcfast.runtime.logs import RunLog, read_log


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_entries_stand_in_both_files_as_they_come(tmp_path):
    log = RunLog(tmp_path)
    log.log({"loss": torch.tensor(0.5), "note": "warm-up"}, step=1)
    log.log({"loss": float("nan"), "valid": np.float32(2)}, step=2)  # a new column, and a number that JSON lacks
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.5, "note": "warm-up"}, {"step": 2, "loss": None, "valid": 2.0}]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == read_log(tmp_path)
    assert rows(tmp_path) == [
        {"step": "1", "loss": "0.5", "note": "warm-up", "valid": ""},
        {"step": "2", "loss": "", "note": "", "valid": "2.0"},
    ]


def test_a_resumed_log_drops_what_will_be_written_again(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(1, 6):
            log.log({"loss": step * 1.0}, step)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # the run was killed in the middle of a line
    with RunLog(tmp_path, resume_step=3) as log:
        log.log({"loss": 40.0}, 4)
    assert [entry["loss"] for entry in read_log(tmp_path)] == [1.0, 2.0, 3.0, 40.0]
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0", "2.0", "3.0", "40.0"]


def test_a_new_log_starts_empty(tmp_path):
    with RunLog(tmp_path) as log:
        log.log({"loss": 1.0}, 1)
    RunLog(tmp_path).close()
    assert read_log(tmp_path) == [] and rows(tmp_path) == []


def test_a_histogram_counts_the_finite_values(tmp_path):
    with RunLog(tmp_path) as log:
        log.histogram("gain", [0.0, 1.0, 1.0, float("inf")], step=0, bins=2)
        log.histogram("none", [float("nan")], step=0)
    gain, none = read_log(tmp_path)
    assert gain["gain"] == {"counts": [1, 2], "edges": [0.0, 0.5, 1.0]}
    assert none["none"] == {"counts": [], "edges": []}


def test_tensorboard_receives_scalars_histograms_and_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    matplotlib.image.imsave(tmp_path / "a.png", np.zeros((4, 4, 3)))
    with RunLog(tmp_path, tensorboard=True) as log:
        log.log({"loss": 0.25, "note": "x"}, step=3)
        log.histogram("gain", [1.0, 2.0], step=3)
        log.figure("panel", tmp_path / "a.png", step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.25)]
    assert events.Tags()["histograms"] == ["gain"] and events.Tags()["images"] == ["panel"]


@pytest.mark.parametrize(("asked", "module"), [({"tensorboard": True}, "torch.utils.tensorboard"), ({"wandb": "project"}, "wandb")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, asked, module):
    monkeypatch.setitem(sys.modules, module, None)
    extra = next(iter(asked))
    with pytest.raises(MissingPackageError, match=rf"cannot be imported .*; pip install 'ttcfast\[{extra}\]'"):
        RunLog(tmp_path, **asked)


def test_a_log_that_cannot_be_begun_leaves_its_folder_free(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError) as kept:  # whose frames hold the log
        RunLog(tmp_path, wandb="project")
    assert not (tmp_path / NAME).exists() and kept.tb is not None


def test_wandb_writes_offline_in_the_runs_folder(tmp_path):
    matplotlib.image.imsave(tmp_path / "a.png", np.zeros((4, 4, 3)))
    with RunLog(tmp_path, wandb="ttc", config={"seed": 3}) as log:
        log.log({"loss": 0.5, "note": "x"}, step=1)
        log.histogram("gain", [1.0, 2.0], step=2)
        log.figure("panel", tmp_path / "a.png", step=2)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert len(list((run / "files" / "media" / "images").glob("panel*.png"))) == 1

"""Classes that a file names: nothing is imported for a name, and nothing but ttcfast's and registered classes is built."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ttcfast.pwm.algorithms import PWM, DynamicsLoss, FlowMatchingDynamicsLoss, MLPDynamicsLoss
from ttcfast.pwm.checkpoint import load_world_model, save_world_model
from ttcfast.pwm.models import BaseWorldModel, MLPWorldModel
from ttcfast.pwm.utils import targets
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError

SIZES = {"observation_dim": 3, "action_dim": 2}
ALG: dict[str, Any] = {
    "model": {
        "_target_": "ttcfast.pwm.models.world_model.MLPWorldModel",
        "latent_dim": 8,
        "units": [8],
        "encoder_units": [8],
    },
    "dynamics_loss": {"_target_": "ttcfast.pwm.algorithms.dynamics_loss.MLPDynamicsLoss"},
}


def naming(key: str, target: str) -> dict[str, Any]:
    alg = copy.deepcopy(ALG)
    alg[key]["_target_"] = target
    return alg


def saved(folder: Path, alg: dict[str, Any]) -> Path:
    agent = PWM.from_config(ALG, **SIZES)
    path = folder / "world_model.safetensors"
    save_world_model(path, agent, alg, SIZES)
    return path


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Path:
    """A module on the path that leaves a mark when it is imported; in it a class that would fit."""
    mark = tmp_path / "imported"
    source = f"open({str(mark)!r}, 'w').close()\nfrom ttcfast.pwm.models import MLPWorldModel\nclass Model(MLPWorldModel): ...\n"
    (tmp_path / "planted_for_ttcfast.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return mark


@pytest.mark.parametrize("key", ["model", "dynamics_loss"])
@pytest.mark.parametrize(
    "target",
    [
        "planted_for_ttcfast.Model",
        "ttcfast.planted_for_ttcfast.Model",
        "ttcfast.os.system",
        "ttcfast.pwm.models.base.nn.Module",  # attributes of ours that lead elsewhere
        "ttcfast.pwm.models.base.ABC",
        "ttcfast.pwm.train_wm.time.sleep",
        "ttcfast.cli.__main__.run",  # a module of ours that does something when it is imported
        "ttcfast.pwm.models.base.BaseWorldModel",  # abstract
        "os.system",
        "builtins.exec",
        "torch.nn.Linear",
    ],
)
def test_a_checkpoint_cannot_have_a_module_imported_or_a_foreign_class_built(key, target, tmp_path, planted):
    path, before = saved(tmp_path, naming(key, target)), set(sys.modules)
    with pytest.raises(CheckpointError, match=r"_target_ is '.*', which is no") as caught:
        load_world_model(path)
    assert "register(" in str(caught.value)
    assert not planted.exists()
    assert set(sys.modules) == before


def test_nor_can_a_configuration(planted):
    with pytest.raises(ArgumentError, match=r"alg.model._target_ is 'planted_for_ttcfast.Model', which is no BaseWorldModel of ttcfast"):
        PWM.from_config(naming("model", "planted_for_ttcfast.Model"), **SIZES)
    assert not planted.exists()


def test_registered_classes_are_found_and_ours_under_every_path(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "_registered", {})

    @targets.register
    class Mine(MLPWorldModel):
        pass

    alg = naming("model", f"{__name__}.{Mine.__qualname__}")
    found = load_world_model(saved(tmp_path, alg)).model
    assert type(found) is Mine
    assert all(bool(torch.isfinite(p).all()) for p in found.parameters())
    assert targets.locate("ttcfast.pwm.models.MLPWorldModel", BaseWorldModel, "here") is MLPWorldModel  # type: ignore[type-abstract]
    assert targets.locate("ttcfast.pwm.algorithms.MLPDynamicsLoss", DynamicsLoss, "here") is MLPDynamicsLoss  # type: ignore[type-abstract]
    with pytest.raises(ArgumentError, match="which is no BaseWorldModel"):
        targets.locate(FlowMatchingDynamicsLoss.__module__ + ".FlowMatchingDynamicsLoss", BaseWorldModel, "here")  # type: ignore[type-abstract]


def test_a_configuration_of_another_kind_is_one_clear_line(tmp_path):
    path = tmp_path / "world_model.safetensors"
    for alg in ([], {"model": []}, {"model": {"_target_": 3}}):
        checkpoints.save(path, {}, {"architecture": "world_model", "alg": alg, "sizes": SIZES})
        with pytest.raises(CheckpointError, match="describes a world model that this version cannot build"):
            load_world_model(path)

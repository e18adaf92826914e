"""What a user without the simulator, or with one that does not fit, is told. Runs without dm_control and gymnasium."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tests.pwm.envs.points import Point
from tests.test_import_cost import loaded_by
from ttcfast.pwm.envs import DMControlEnv, as_gymnasium, dm_control, make_env
from ttcfast.runtime.errors import MissingPackageError


def test_importing_the_wrapper_loads_no_simulator():
    assert loaded_by("import ttcfast.pwm.envs", {"dm_control", "mujoco"}, blocked={"dm_control", "mujoco"}) == []


def test_a_missing_gymnasium_is_one_clear_error(monkeypatch):
    assert loaded_by("import ttcfast.pwm.envs", {"gymnasium"}, blocked={"gymnasium"}) == []
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    for call in (lambda: make_env("gymnasium:Pendulum-v1"), lambda: as_gymnasium(Point())):
        with pytest.raises(MissingPackageError, match=r"needs the package gymnasium, .*pip install 'ttcfast\[gym\]'"):
            call()


def test_a_missing_simulator_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    monkeypatch.setattr(sys, "version_info", (3, 12))
    with pytest.raises(MissingPackageError, match=r"needs the package dm_control, .*pip install 'ttcfast\[dmc\]'"):
        DMControlEnv("cartpole-swingup")
    monkeypatch.setattr(sys, "version_info", (3, 13))
    with pytest.raises(MissingPackageError, match="installs on Python 3"):
        DMControlEnv("cartpole-swingup")


def test_a_simulator_of_another_version_is_one_clear_error(monkeypatch):
    def load(*args, **kwargs):
        raise AttributeError("'MjModel' object has no attribute 'flex_vertedge'")

    monkeypatch.setattr(dm_control, "_suite", lambda: SimpleNamespace(load=load))
    monkeypatch.setattr(dm_control, "versions", lambda: {"dm_control": "1.0.50", "mujoco": "4.0.0"})
    with pytest.raises(MissingPackageError, match=r"dm_control 1.0.50 does not work with mujoco 4.0.0 .*flex_vertedge"):
        DMControlEnv("cartpole-swingup")

"""Updates of surrogates and reward models on a device: the host's numbers, and one wait for all that is logged of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_cuda import FakeCuda
from tests.surrogates import drop_surrogate, euler_state, shifted
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.data.generate import GenerateConfig, generate
from ttcfast.models.checkpoint import save_surrogate, surrogate_meta
from ttcfast.models.train import TrainConfig, _Run
from ttcfast.models.vit import ViT, ViTConfig
from ttcfast.rewards.prm.train import DataOptions, LossOptions, ModelOptions, OptimOptions, TrainPRMConfig
from ttcfast.rewards.prm.training.on_policy import OnPolicyConfig
from ttcfast.rewards.prm.training.on_policy import _Run as _OnPolicyRun
from ttcfast.rewards.prm.training.run import PRMTraining
from ttcfast.rewards.prm.triplets.build import build_triplets
from ttcfast.spec import StateSpec

SIZES = {"width": 16, "depth": 1, "heads": 2, "refine": 4, "patch": 2}
NORM = Normalizer(torch.tensor([1.0, 0.0, 0.0, 2.5]), torch.ones(4), torch.full((4,), 0.1))
UPDATES = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("training")
    common: dict[str, Any] = {"out": str(out), "presets": ("riemann4",), "grid": 8, "frames": 5, "t_end": 0.2, "per_file": 4, "batch": 4}
    for split in ("train", "reward", "valid"):
        generate(GenerateConfig(split=split, n=4, **common))
    torch.manual_seed(0)
    model = ViT(ViTConfig(grid=(8, 8), dropout=0.1, **SIZES))
    save_surrogate(out / "fm.safetensors", model, surrogate_meta(model, NORM, StateSpec.euler2d(cell_volume=1 / 64)))
    walls = torch.zeros(8, 8, dtype=torch.bool)
    walls[0] = True
    spec = StateSpec.euler2d(boundary_mask=walls, boundary_value=1.0)
    stochastic = Surrogate(drop_surrogate(scale=0.5).model, spec, predicts="delta", normalizer=NORM)
    torch.manual_seed(1)
    build_triplets(stochastic, shifted(euler_state(12), 3), out / "triplets", K=9, T_prm=3)
    return out


def surrogate(made: Path, out: Path, device: str) -> Any:
    config = TrainConfig(
        data=str(made),
        out=str(out),
        model=SIZES,
        steps=9,
        batch=4,
        valid=2,
        pushforward=0.5,
        pushforward_from=0.0,
        input_noise=0.0,  # drawn by the device, whose generator has other numbers
        device=device,
    )
    return _Run(config, out)


def reward(made: Path, out: Path, device: str, kind: str) -> Any:
    size: dict[str, Any] = {"width": (6, 8), "depth": (1, 1), "levels": 2} if kind == "dense" else {"width": 8, "depth": 1}
    config = TrainPRMConfig(
        data=DataOptions(root=str(made / "triplets"), valid=0.25),
        model=ModelOptions(kind=kind, **size),
        loss=LossOptions(conservation=0.1, boundary=0.1),
        optim=OptimOptions(batch=4, steps=9),
        out=str(out),
        device=device,
    )
    return PRMTraining(config, None, None)


def on_policy(made: Path, out: Path, device: str) -> Any:
    config = OnPolicyConfig(
        fm=str(made / "fm.safetensors"),
        data=str(made),
        out=str(out),
        model={"width": 8, "levels": 2, "patch": 2},
        batch=3,
        steps=9,
        valid=2,
        stochastic=0.5,
        refined=0.5,
        device=device,
    )
    return _OnPolicyRun(config, out)


TRAININGS: dict[str, Callable[..., Any]] = {
    "surrogate": surrogate,
    "dense reward": partial(reward, kind="dense"),
    "scalar reward": partial(reward, kind="scalar"),
    "reward along rollouts": on_policy,
}


@pytest.mark.parametrize("name", TRAININGS)
def test_updates_are_those_of_the_host_and_wait_once(made, tmp_path, name):
    here = TRAININGS[name](made, tmp_path / "host", "cpu")
    expected = [here.step(i) for i in range(UPDATES)]
    with FakeCuda() as gpu:
        there = TRAININGS[name](made, tmp_path / "gpu", "cuda")
        found = [there.step(0)]
        with gpu.counting() as waits:
            found += [there.step(i) for i in range(1, UPDATES)]
    assert found == [pytest.approx(numbers, rel=1e-5) for numbers in expected]
    assert all(math.isfinite(value) for numbers in found for value in numbers.values())
    each = 2 if name == "reward along rollouts" else 1  # its states go back to a pool on the host
    assert sum(waits.values()) == each * (UPDATES - 1), waits

"""Every search makes the same choices on the fake device as on the host."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import ttcfast
from tests.fake.cases import CASES, SPEC, prm
from tests.fake_cuda import CudaTensor, FakeCuda, on_host
from tests.surrogates import drop_surrogate, euler_state
from ttcfast.core import onednn
from ttcfast.evaluation.evaluate import Problems
from ttcfast.ttc.result import RolloutResult

T = 3
MEASURED = ("seconds", "peak_bytes", "chunk_size")


@pytest.fixture(autouse=True)
def products_of_torch(monkeypatch):
    """The fake device multiplies as torch does on a CPU, where a surrogate takes oneDNN."""
    monkeypatch.setattr(onednn, "_product", None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_search_chooses_as_on_the_host(name):
    case = CASES[name]
    x0 = case.start()

    def rolled(device: str) -> RolloutResult:
        search = case.search(device)
        torch.manual_seed(0)  # of a foreign model
        return search.rollout(x0.to(device), T, return_info=True, **case.rollout)

    expected = rolled("cpu")
    with FakeCuda():
        found = rolled("cuda")
    assert isinstance(found.trajectory, CudaTensor)
    require_equal(on_host(found), expected)


def test_the_front_door_moves_a_reward_to_the_models_device():
    x0 = euler_state(2)
    given = Problems(torch.stack([x0, x0], 1), SPEC, 1)
    options = {"branching_factor": 4, "seed": 3}

    def both(device: str) -> tuple[RolloutResult, torch.Tensor]:
        torch.manual_seed(0)
        model = drop_surrogate().to(device)
        found = ttcfast.improve(model, x0.to(device), T, reward=prm(1), **options)
        return found, ttcfast.evaluate(model, given, {"prm": prm(1)}, oracle=False, **options).find("prm").mse

    expected = both("cpu")
    with FakeCuda():
        found = both("cuda")
    assert isinstance(found[0].trajectory, CudaTensor)
    require_equal(on_host(found), expected)


def require_equal(found: object, expected: object, path: str = "") -> None:
    """Raise unless two results hold the same bits."""
    assert type(found) is type(expected), path
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{path}: {text}")
    elif dataclasses.is_dataclass(expected):
        for f in dataclasses.fields(expected):
            if f.name not in MEASURED:
                require_equal(getattr(found, f.name), getattr(expected, f.name), f"{path}.{f.name}")
    elif isinstance(expected, tuple):
        assert len(found) == len(expected), path
        for i, pair in enumerate(zip(found, expected)):
            require_equal(*pair, f"{path}[{i}]")
    else:
        assert found == expected, path

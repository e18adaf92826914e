"""How many candidates are made at once on a CPU: measured where it changes nothing but speed, and recorded."""

import math

import pytest
import torch
from torch import Tensor, nn

from tests.surrogates import DropNet, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc import chunk_speed
from ttcfast.ttc.chunk_speed import fastest
from ttcfast.ttc.inference import TTCGreedy

SPEC = StateSpec.euler2d()


def last_cell(x: Tensor, candidates: Tensor) -> Tensor:
    return candidates[..., 0, -1, -1]


@pytest.fixture
def sizes(monkeypatch):
    """Sizes that measurements find, in turn."""
    found: list[int | None] = []
    monkeypatch.setattr(chunk_speed, "fastest", lambda seconds, most: found.pop(0))
    return found


def surrogate() -> Surrogate:
    """A new one, of which nothing was measured, with the weights of all others."""
    torch.manual_seed(0)
    return Surrogate(DropNet(), SPEC)


def rolled(fm: Surrogate, b: int = 64, n: int = 1, **options):
    return TTCGreedy(fm, last_cell, TTCConfig(branching_factor=b, **options)).rollout(euler_state(n), 2, return_info=True)


@pytest.mark.parametrize(
    "seconds, most, expected",
    [
        (lambda size: 1 + 0.5 / size, 64, 8),  # hardly better in larger chunks
        (lambda size: 10 / size, 200, None),  # all that counts is the number of calls
        (lambda size: 100 / size + (size if size > 32 else 0), 1024, 32),  # a cache of 32
        (lambda size: size, 64, 1),  # the largest model
        (lambda size: max(size, 2) + 1 / size, 64, 2),
    ],
)
def test_the_size_is_that_of_the_least_time_by_factors_of_two(seconds, most, expected):
    asked = []

    def noted(size: int) -> float:
        asked.append(size)
        return seconds(size)

    assert fastest(noted, most) == expected
    assert max(asked) <= most and len(asked) <= 2 + math.log2(most)


def test_a_measured_size_changes_no_choice_and_is_in_the_result(sizes):
    whole = rolled(surrogate(), chunk_size=63)
    for measured, taken in ((16, 16), (20, 16), (100, None), (None, None)):  # 63 candidates in 4 chunks
        sizes[:] = [measured]
        found = rolled(surrogate())
        assert found.chunk_size == taken and torch.equal(found.chosen, whole.chosen) and found.nfe == whole.nfe
        torch.testing.assert_close(found.trajectory, whole.trajectory)
    sizes[:] = [8]
    assert rolled(surrogate(), b=8, n=8).chunk_size == 8


def test_it_is_measured_once_for_a_surrogate_and_a_shape(sizes):
    fm = surrogate()
    sizes[:] = [16, 32]
    assert [rolled(fm, b).chunk_size for b in (64, 64, 96)] == [16, 16, 16] and sizes == [32]
    assert rolled(fm, stochastic={"dropout_p": 0.3}).chunk_size == 32 and not sizes


class Draws(nn.Module):
    """Draws from torch's own stream, in which other chunks take other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DropNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 0.01 * torch.randn_like(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model, options", [(Draws(), {}), (DropNet(), {"b": 63}), (DropNet(), {"chunk_size": 5})])
def test_nothing_is_measured_that_would_change_the_draws_or_does_not_pay(model, options, sizes):
    assert rolled(Surrogate(model, SPEC), **options).chunk_size == options.get("chunk_size")


def test_a_rollout_goes_on_in_the_chunks_it_began_with(sizes, tmp_path):
    sizes[:] = [16, 32]
    make, x = lambda: TTCGreedy(surrogate(), last_cell, TTCConfig(branching_factor=64)), euler_state(1)
    first = make().rollout(x, 2, return_info=True, resume=tmp_path)
    again = make().rollout(x, 2, return_info=True, resume=tmp_path)
    assert not sizes and first.chunk_size == again.chunk_size == 16 and torch.equal(first.trajectory, again.trajectory)

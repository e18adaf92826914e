import logging

import pytest
import torch

from ttcfast.runtime.errors import DataError
from ttcfast.runtime.units import Units, require_units, time_step_of

MADE_FOR = Units("the surrogate of fm.safetensors", 0.05, 1 / 4096, 1.4)


@pytest.mark.parametrize(
    "given, told",
    [
        (Units("data file a", 0.1), r"data file a has time step 0\.1 and the surrogate of fm\.safetensors is made for 0\.05; do this"),
        (Units("data file a", 0.05, 1 / 1024), r"has cell volume 0\.000976562 and .* made for 0\.000244141; do this"),
        (Units("data file a", 0.05, 1 / 4096, 5 / 3), r"has gamma 1\.66667 and .* made for 1\.4; do this"),
        (Units("data file a", gamma=torch.tensor([1.4, 1.6])), r"has gamma 1\.4 to 1\.6 and"),
        (Units("data file a", cell_volume=torch.tensor([[1 / 4096, 2 / 4096]])), "has cell volume 0.000244141 to 0.000488281 and"),
        (Units("data file a", float("nan")), "has time step nan"),
    ],
)
def test_what_does_not_fit_is_refused(given, told):
    with pytest.raises(DataError, match=told):
        require_units(given, MADE_FOR, "do this")


def test_rounding_fits():
    times = (0.05 * torch.arange(21) + 100).float()  # float32 far from 0: single steps differ by 1e-4 of themselves
    given = Units("data", time_step_of(times.double()), float(torch.tensor(1 / 64).float() ** 2) * (1 + 1e-6), 1.4)
    require_units(given, MADE_FOR, "")
    require_units(Units("data", 0.05, torch.full((4, 4), 1 / 4096), torch.tensor([1.4] * 3)), MADE_FOR, "")
    grid = torch.rand(4, 4) + 1
    require_units(Units("data", cell_volume=grid), Units("reward", cell_volume=grid.double()), "")
    with pytest.raises(DataError, match="cell volume"):
        require_units(Units("data", cell_volume=grid), Units("reward", cell_volume=grid.flip(0)), "")


def test_what_is_not_known_is_said_and_not_refused(caplog):
    with caplog.at_level(logging.INFO, "ttcfast"):
        require_units(Units("data file a", 0.1, 1 / 4096), Units("an old surrogate", None, 1 / 4096), "")
    assert caplog.messages == ["the time steps of data file a and an old surrogate are not compared: not both are recorded"]


def test_a_time_step_is_the_mean_one():
    assert time_step_of(torch.tensor([1.0, 1.25, 1.5, 1.75], dtype=torch.float64)) == 0.25
    assert time_step_of(torch.zeros(1)) is None

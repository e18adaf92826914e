"""The Fourier neural operator: its symmetry, its sites of noise, checkpoints, and that it learns."""

import copy

import pytest
import torch

from ttcfast.core.base_fm import Surrogate
from ttcfast.models.fno import FNO, FNOConfig
from ttcfast.spec import StateSpec


def model(**sizes):
    torch.manual_seed(0)
    made = FNO(FNOConfig(**{"grid": (16, 16), "width": 8, "modes": 5, "depth": 2, **sizes})).eval()
    torch.nn.init.normal_(made.out.weight)
    return made


def test_the_untrained_model_is_persistence():
    assert not FNO(FNOConfig(grid=(16, 16), modes=4))(torch.randn(2, 1, 16, 16)).any()


def test_it_commutes_with_shifts_along_x_and_sees_the_phase_along_y():
    x = torch.randn(2, 1, 16, 16)
    for waves, along_y in (((), True), ((2,), False)):
        fno = model(waves=waves)
        torch.testing.assert_close(fno(x.roll(3, 2)), fno(x).roll(3, 2), atol=1e-5, rtol=1e-4)
        shifted = torch.allclose(fno(x.roll(3, 3)), fno(x).roll(3, 3), atol=1e-5, rtol=1e-4)
        assert shifted is along_y


def test_candidates_differ_by_its_dropout_in_any_chunk():
    surrogate = Surrogate(model(dropout=0.2), StateSpec.fields("vorticity"))
    x = torch.randn(2, 1, 16, 16)
    whole = surrogate.candidates(x, torch.arange(4), seed=0, step=1)
    parts = torch.cat([surrogate.candidates(x, ids, seed=0, step=1) for ids in torch.arange(4).split(2)], 1)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)
    assert float((whole[:, 0] - whole[:, 1]).abs().max()) > 1e-3


def test_it_learns_a_shift():
    torch.manual_seed(0)
    fno = FNO(FNOConfig(grid=(16, 16), width=8, modes=5, depth=2, dropout=0.0))
    optimizer = torch.optim.Adam(fno.parameters(), lr=1e-2)
    smooth = torch.randn(64, 1, 16, 16)
    smooth = torch.fft.irfft2(
        torch.fft.rfft2(smooth) * (torch.fft.fftfreq(16, 1 / 16)[:, None].abs() < 4) * (torch.arange(9) < 4), s=(16, 16)
    )
    for _ in range(150):
        x = smooth[torch.randint(64, (16,))]
        loss = (fno(x) - (x.roll(1, 2) - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = (smooth.roll(1, 2) - smooth).square().mean()
    assert float((fno(smooth) - (smooth.roll(1, 2) - smooth)).square().mean()) < 0.05 * float(still)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"modes": 9}, r"modes is 9 on a grid of \(16, 16\); give at most 8"),
        ({"periodic": (True, False)}, "takes periodic axes, use architecture=vit"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"width": 0}, "width is 0"),
    ],
)
def test_wrong_sizes_are_one_clear_error(sizes, message):
    with pytest.raises(ValueError, match=message):
        FNOConfig(**{"grid": (16, 16), "modes": 4, **sizes})
    with pytest.raises(ValueError, match="this FNO takes"):
        model()(torch.zeros(1, 2, 16, 16))


def test_in_double_precision_it_is_precise():
    fno, x = model(), torch.randn(2, 1, 16, 16, dtype=torch.float64)
    double = copy.deepcopy(fno).double()
    found = double(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), fno(x.float()), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(double(x.roll(3, 2)), found.roll(3, 2), atol=1e-13, rtol=0)

"""Candidates that depend on one another, and models that cannot be traced: what is said of them, and that nothing is said of others."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.surrogates import DropNet, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.spec import StateSpec

SPEC, IDS = StateSpec.euler2d(), torch.arange(1, 5)


def candidates(fm: Surrogate, x: Tensor, ids: Tensor = IDS, **options) -> Tensor:
    return fm.candidates(x, ids, **{"seed": 0, "step": 1, **options})


class Normalised(DropNet):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)


class Centred(DropNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 0.5 * super().forward(x).mean(0)


class Draws(DropNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.rand_like(x)


class Offset(DropNet):
    """Draws one number in each call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.rand(())


class Borrows(DropNet):
    """What a state gets from the others is noise alone."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.lift(x))
        return self.head(self.drop(z) + (self.drop(z) - z).mean(0))


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Normalised, r"BatchNorm without running statistics normalises by the batch \(module 'norm'\); use track_running_stats=True"),
        (Centred, "its forward mixes the states of a batch"),
        (Draws, r"it draws noise of its own, which no key reaches \(functional dropout, or random numbers in a forward\)"),
        (Offset, "it draws noise of its own"),
        (Borrows, "the noise at 'drop' gets from one state to others"),
    ],
)
def test_candidates_that_depend_on_others_are_said_once_with_the_reason(kind, reason):
    torch.manual_seed(0)
    fm, x = Surrogate(kind(), SPEC), euler_state(2)
    message = f"the candidates of {kind.__name__} depend on the others in their batch, and so on chunks and order: {reason}"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        for step in range(3):
            candidates(fm, x, step=step)
    assert len(caught) == 1 and caught[0].filename == __file__
    for config in ({"dropout": False, "input_eps": 0.1}, {"dropout_p": 0.5, "dropout_after": ("head",)}):
        if kind is not Borrows:
            with pytest.warns(RuntimeWarning, match=message):
                candidates(fm, x, stochastic=config)


def test_rounding_by_the_size_of_a_batch_is_no_mixing_also_where_a_model_leaves_holes():
    class Holes(DropNet):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x) * (1 + 1e-4 * len(x))  # far less than what noise does, more than rounding usually does
            out[..., 2:4, 3] = torch.nan  # land
            return out

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        candidates(Surrogate(Holes(), SPEC), euler_state(2))


def test_a_model_for_one_state_alone_says_that_it_could_not_be_traced():
    class Alone(DropNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(1, 4, 8, 8))

    fm = Surrogate(Alone(), SPEC)
    with pytest.warns(
        RuntimeWarning, match=r"Alone could not be run on 2 and 4 states \(RuntimeError: shape .*told by the sizes of axes alone"
    ) as c:
        candidates(fm, euler_state(1), IDS[:1])
        candidates(fm, euler_state(1), IDS[1:2])
    assert len(c) == 1


def test_a_model_that_fails_says_so_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="returned shape"):
            candidates(Surrogate(nn.Conv2d(4, 3, 1), SPEC, stochastic={"input_eps": 0.1}), euler_state(1))

"""The deterministic step as a state without noise in the call that makes the candidates."""

import pytest
import torch
from torch import Tensor, nn

from tests.core.test_row_trace import DROPS, LATENT, LAYOUTS, TABLES, Attends, Folds, Fourier, Table, window
from tests.dropouts import DropPath
from tests.stochastic_sampling.test_keyed_noise import DropBlock2d, OwnDropout
from tests.surrogates import drop_surrogate, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.spec import StateSpec
from ttcfast.stochastic_sampling import DeterministicModelError, NoiseSite

SPEC, IDS, PROBLEMS, SEED = StateSpec.euler2d(), torch.arange(1, 5), torch.tensor([7, 2]), 5


class Sampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise = NoiseSite(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.noise(x) * self.noise(x)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(self.drop(torch.complex(x, x))).sum(-1)


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


ENTRYWISE = {
    "entries": (nn.Dropout(0.3), {}),
    "in place": (nn.Sequential(nn.Softplus(), nn.Dropout(0.3, inplace=True)), {}),
    "channels": (nn.Dropout2d(0.3), {}),
    "alpha": (nn.AlphaDropout(0.3), {}),
    "channels alpha": (nn.FeatureAlphaDropout(0.3), {}),
    "path": (DropPath(0.5), {}),
    "block": (DropBlock2d(0.3, 2), {}),
    "twice": (nn.Sequential(drop := nn.Dropout(0.3), nn.Dropout(0.2), drop), {}),
    "after": (nn.Identity(), {"dropout_p": 0.3, "dropout_after": ("",)}),
    "latent": (nn.Identity(), {"latent_sigma": 0.1, "latent_at": ""}),
    "input": (nn.Identity(), {"input_eps": 0.1}),
    "noise site": (Sampler(), {}),
    "complex": (Complex(), {}),
    "pairs": (nn.Dropout(0.3), {"input_eps": 0.1, "antithetic": True}),
}


def both(fm: Surrogate, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The deterministic step and the candidates: of one call, of two, and the numbers of states of the first."""
    sizes: list[int] = []
    fm.model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    options = {"problem_ids": PROBLEMS, "seed": SEED, "step": 3}
    fm.candidates(x, IDS, **options, include_deterministic=True)  # traced
    sizes.clear()
    joint, called = fm.candidates(x, IDS, **options, include_deterministic=True), sizes.copy()
    still = fm.deterministic(x, problem_ids=PROBLEMS, step=3)
    return joint, torch.cat([still.unsqueeze(1), fm.candidates(x, IDS, **options)], 1), called


@pytest.mark.parametrize("site", ENTRYWISE)
def test_it_has_no_noise_and_the_candidates_have_theirs_bit_for_bit(site):
    model, config = ENTRYWISE[site]
    joint, apart, called = both(Surrogate(model, SPEC, stochastic=config), euler_state(2))
    assert torch.equal(joint, apart) and called == [10]
    assert all(not torch.equal(joint[:, 0], joint[:, b]) for b in range(1, 5))


@pytest.mark.parametrize("noise", DROPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_any_layout(layout, noise):
    model = Folds(*LAYOUTS[layout], DROPS[noise](), 2)
    joint, apart, called = both(Surrogate(model, SPEC, history=2, stochastic=LATENT if noise == "latent" else {}), window(2))
    torch.testing.assert_close(joint, apart)
    assert called == [10] and not torch.allclose(joint[:, 0], joint[:, 1])


@pytest.mark.parametrize("model", [Attends(True), Attends(False), *(Table(*each) for each in TABLES.values())])
def test_in_attention_and_on_tables(model):
    joint, apart, called = both(Surrogate(model, SPEC), euler_state(2))
    torch.testing.assert_close(joint, apart)
    assert called == [10]


def test_with_modes_in_front_of_the_states():
    joint, apart, called = both(Surrogate(Fourier(), SPEC, history=2), window(2))
    torch.testing.assert_close(joint, apart)
    assert called == [10]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model, options",
    [
        (Functional(), {}),
        (OwnDropout(0.3), {}),
        (Table(lambda z, t: (z.transpose(0, 1) + t[:, None]).transpose(0, 1), (64, 8)), {}),  # one draw for all
        (nn.Dropout(0.3), {"stochastic": {"symmetry": True}}),
        (nn.Conv2d(4, 4, 1), {"stochastic": {"latent_sigma": 0.1, "latent_at": ""}, "dtype": torch.bfloat16}),
    ],
)
def test_it_is_computed_by_itself_where_its_noise_cannot_be_left_out(model, options):
    fm = Surrogate(model, SPEC, **options)
    joint, apart, called = both(fm, euler_state(2))
    assert torch.equal(joint, apart) and 10 not in called


class Same(Sampler):
    """Any noise has the same effect."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.noise(x) != 0)


@pytest.mark.parametrize("fm", [drop_surrogate(stochastic={"dropout": False, "latent_sigma": 1e-30}), Surrogate(Same(), SPEC)])
def test_candidates_that_are_all_the_same_are_an_error_beside_it_too(fm):
    with pytest.raises(DeterministicModelError, match="16 probes are all the same"):
        fm.candidates(euler_state(2), IDS, seed=0, step=0, include_deterministic=True)

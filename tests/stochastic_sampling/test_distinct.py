"""How many candidates differ, and what is said of a model whose candidates do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.dropouts import DropPath
from tests.surrogates import DropNet, Foreign, euler_state
from ttcfast import TTCBeam, TTCConfig, TTCGreedy
from ttcfast.core.base_fm import Surrogate
from ttcfast.spec import StateSpec
from ttcfast.stochastic_sampling import DeterministicModelError
from ttcfast.stochastic_sampling.distinct import distinct_count, projected

SPEC = StateSpec.euler2d()


def count(candidates: Tensor) -> list[int]:
    return distinct_count(projected(candidates), candidates[:, 0].nan_to_num(nan=1.0)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_repeats_are_counted_once(dtype, size):
    x = torch.rand(2, 7, 4, size, size, dtype=dtype) + 1
    assert count(x) == [7, 7]
    x[0, 3], x[0, 6], x[1, 1:] = x[0, 1], x[0, 1], x[1, :1]
    assert count(x) == [5, 1]
    assert count(x * (1 + torch.finfo(dtype).eps * torch.randn_like(x))) == [5, 1]  # rounding makes no difference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_candidates_of_16_bits_and_under_autocast_count_alike(dtype):
    x = torch.rand(2, 1, 4, 32, 32) * (1 + 0.5 * torch.randn(2, 7, 4, 32, 32)) + 1
    x[0, 3], x[0, 6], x[1, 1:] = x[0, 1], x[0, 1], x[1, :1]
    assert count(x.to(dtype)) == [5, 1]
    y = (x.to(dtype).double() * (1 + 0.4 * torch.finfo(dtype).eps * torch.randn(2, 7, 4, 32, 32))).to(dtype)
    assert count(y) == [5, 1]  # one rounding makes no difference
    x = x[:, :1] + 1e-4 * (x - x[:, :1])  # a difference that no 16 bits show
    with torch.autocast("cpu", dtype=dtype):
        assert count(x) == [5, 1]


def test_a_small_channel_beside_a_large_one_and_a_channel_of_zeros_count():
    x = torch.ones(1, 3, 4, 8, 8)
    x[:, :, 3], x[:, :, 1] = 1e5, 0.0
    assert count(x) == [1]
    x[0, 1, 0, 2, 2] += 1e-2
    assert count(x) == [2]
    x[0, 2, 0] = torch.nan
    assert count(x) == [3]


def test_one_cell_is_enough():
    x = (torch.rand(1, 1, 4, 64, 64) + 1).repeat(1, 4, 1, 1, 1)
    x[0, 2, 1, 5, 5] += 1e-2
    assert count(x) == [2]


class Path(nn.Module):
    """Most candidates are the deterministic step: the only noise is a whole path that is rarely dropped."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.lift, self.drop_path = nn.Conv2d(4, 4, 1), DropPath(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.lift(x))


@pytest.mark.parametrize("chunk", [None, 2, 6])
@pytest.mark.parametrize("kind, options", [(TTCGreedy, {}), (TTCBeam, {"approach": "beam", "beam_width": 2})])
def test_a_rollout_counts_distinct_candidates_and_warns_of_few(kind, options, chunk):
    torch.manual_seed(0)
    search = kind(Surrogate(Path(), SPEC), lambda x, c: c[..., 0, 0, 0], TTCConfig(branching_factor=8, chunk_size=chunk, **options))
    with pytest.warns(RuntimeWarning, match=r"of 8 candidates of Path only 3 are distinct on average.*raise the noise"):
        result = search.rollout(euler_state(3), 3, return_info=True)
    expected = {TTCGreedy: [[3, 3, 3]] * 3, TTCBeam: [[3, 6, 6]] * 3}[kind]  # undisturbed, kept and dropped, of each beam
    assert result.distinct.tolist() == expected


def test_all_candidates_of_ordinary_noise_are_distinct(recwarn):
    fm = Surrogate(DropNet(), SPEC)
    result = TTCGreedy(fm, lambda x, c: c[..., 0, 0, 0], TTCConfig(branching_factor=6)).rollout(euler_state(2), 2, return_info=True)
    assert result.distinct.tolist() == [[6, 6], [6, 6]]
    alone = TTCGreedy(fm, lambda x, c: c[..., 0, 0, 0], TTCConfig(branching_factor=1)).rollout(euler_state(2), 2, return_info=True)
    assert alone.distinct.tolist() == [[1, 1], [1, 1]]
    assert not [w for w in recwarn if "distinct" in str(w.message)]


def refusal(fm: object, **options: object) -> str:
    with pytest.raises(DeterministicModelError) as caught:
        TTCGreedy(fm, lambda x, c: c[..., 0, 0, 0], TTCConfig(branching_factor=4, **options)).rollout(euler_state(2), 1)
    return str(caught.value)


def test_the_error_says_which_sites_acted_at_which_rates_and_which_modules_could():
    class Unused(nn.Module):
        """Of two dropouts one is never called, and the other sees nothing but zeros."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.lift, self.head = nn.Dropout(0.3), nn.Dropout(0.2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lift(x)) + self.second(torch.zeros_like(x))

    told = refusal(Surrogate(Unused(), SPEC))
    assert "of 2 noise sites 1 acted (entries 0.2 at 'second')" in told and "modules 'lift'" in told
    assert "of 0 noise sites 0 acted" in refusal(Surrogate(DropNet(p=0.0), SPEC))


def test_the_error_names_the_input_and_the_model_itself_as_what_they_are():
    class Blocked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.0 * F.dropout(x, 1 / 3, self.training)

    told = refusal(Surrogate(Blocked(), SPEC, stochastic={"input_eps": 0.1}))
    assert "of 2 noise sites 2 acted (input 0.1 at the input, training of unknown rate at the model itself)" in told


def test_rounding_is_told_as_such():
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-8 * self.drop(torch.ones_like(x))

    assert "all the same but for rounding (they differ by" in refusal(Surrogate(Rounds(), SPEC))


def test_nothing_is_recommended_that_a_foreign_model_ignores():
    told = refusal(Foreign(0.0))
    assert "Foreign stays deterministic" in told and "let sample_next draw anew" in told and "wrap the model in a Surrogate" in told
    assert not [option for option in ("dropout_p", "dropout_after", "input_eps", "latent_sigma") if option in told]

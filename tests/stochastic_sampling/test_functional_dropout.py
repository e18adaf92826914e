"""Dropout that a model calls by function acts in candidates: found in the source, or in the modules that are named."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.surrogates import drop_surrogate, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.spec import StateSpec, StochasticConfig
from ttcfast.stochastic_sampling import noise_sites
from ttcfast.stochastic_sampling.functional_dropout import functional_dropout

SPEC = StateSpec.euler2d()


class Block(nn.Module):
    """A convolution, then dropout by function, of a rate that is a number or an attribute, as people write it."""

    def __init__(self, p: float = 0.3, batch_norm: bool = True) -> None:
        super().__init__()
        self.p, self.lift, self.head = p, nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.norm = nn.BatchNorm2d(16) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.norm(self.lift(x)), self.p, self.training))


class Attention(nn.Module):
    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.qkv, self.drop = nn.Linear(4, 12), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.0)
        return mixed.transpose(1, 2).reshape(x.shape)


class Residual(nn.Module):
    """The call stands in a helper method."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(4, 4, 1)

    def _noisy(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout2d(x, 0.25, training=self.training)

    def forward(self, x: Tensor) -> Tensor:
        return x + self._noisy(self.lift(x))


class Inherits(Block):
    """Its forward stands in its base."""


class Calls(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def _noisy(self, x: Tensor) -> Tensor:
        return super()._noisy(x) * 1.0


class Replaces(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lift(x))


class Aside(nn.Module):
    """Reads its mode for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lift(x) if self.training else self.lift(x) * 1.0


def draw(fm: Surrogate, x: Tensor, ids: Tensor | None = None) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fm.candidates(x, torch.arange(1, 5) if ids is None else ids, seed=0, step=0)


@pytest.mark.parametrize(
    "model, found",
    [
        (Block(), {"": 0.3}),
        (Block(0.0), {}),  # nothing is dropped
        (nn.Sequential(Inherits(), Calls(), Replaces()), {"0": 0.3, "1": 0.25}),
        (nn.Sequential(Attention(), Residual(), Aside(), nn.Dropout(0.1)), {"0": 0.2, "1": 0.25}),
        (nn.TransformerEncoderLayer(8, 2), {}),  # what torch's layers drop is in modules
        (torch.jit.script(Aside()), {}),  # has no source
    ],
    ids=["number", "zero", "inherited", "nested", "torch", "script"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_calls_are_found_with_their_rates(model, found):
    assert functional_dropout(dict(model.named_modules())) == found


@pytest.mark.parametrize("model", [Block(), Attention(), Residual(), Inherits()], ids=lambda m: type(m).__name__)
def test_dropout_by_function_acts_in_candidates_and_says_that_it_is_not_keyed(model):
    fm, x = Surrogate(model, SPEC), euler_state(2)
    with pytest.warns(RuntimeWarning, match=f"what {type(model).__name__} drops by function cannot be keyed"):
        out = fm.candidates(x, torch.arange(1, 5), seed=0, step=0)
    assert float(out.std(1).mean()) > 1e-4
    assert torch.equal(out, draw(fm, x))  # the same call draws the same
    assert not any(m.training for m in model.modules())
    assert torch.equal(fm.deterministic(x), fm.deterministic(x))
    assert fm.dropout_rates()[0] == next(iter(functional_dropout(dict(model.named_modules())).values()))


def test_batch_norm_stays_in_evaluation_and_modules_inside_keep_their_keys():
    model = nn.Sequential(Block(), nn.Dropout(0.2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fm = Surrogate(model, SPEC, stochastic={"training_modules": [""]})
    draw(fm, euler_state(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sites = {site.name: site.kind for site in noise_sites(model, fm.stochastic)}
    assert sites["1"] == "entries" and sites[""] == sites["0"] == sites["0.lift"] == "training" and "0.norm" not in sites


def test_named_modules_alone_are_held():
    model = nn.Sequential(Residual(), Block(), Aside())
    kinds = lambda **config: [s.name for s in noise_sites(model, StochasticConfig(**config)) if s.kind == "training"]  # noqa: E731
    assert kinds() == ["0", "1"] and kinds(dropout=False) == [] and kinds(training_modules=()) == []
    assert kinds(training_modules=("0",)) == ["0", "0.lift"] and kinds(dropout=False, training_modules=["2.lift"]) == ["2.lift"]
    with pytest.raises(ValueError, match=r"training_modules names \['9'\], which Sequential does not have"):
        kinds(training_modules=["9"])
    with pytest.raises(ValueError, match="training_modules is the string '0'; give a list"):
        kinds(training_modules="0")


def test_spectral_normalisation_is_not_trained():
    class Spectral(nn.Module):
        def __init__(self, normed: nn.Module) -> None:
            super().__init__()
            self.layer = normed

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.layer(x), 0.5, self.training)

    for normed in (nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)), nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))):
        model = Spectral(normed)
        fm = Surrogate(model, SPEC, stochastic={"training_modules": [""]})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert float(draw(fm, euler_state(1)).std(1).mean()) > 1e-4
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_without_it_draw_what_they_drew():
    fm, x = drop_surrogate(), euler_state(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = fm.candidates(x, torch.arange(1, 5), seed=0, step=0)
    none = drop_surrogate(stochastic={"training_modules": ()})
    assert torch.equal(first, none.candidates(x, torch.arange(1, 5), seed=0, step=0))

"""Candidates of one call are those of a call each, for every kind of noise and several kinds of models; and a model may be replaced."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.surrogates import DropNet, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.models.vit import ViT, ViTConfig
from ttcfast.spec import StateSpec

SPEC, IDS = StateSpec.euler2d(), torch.arange(1, 5)


class Residual(nn.Module):
    """Blocks that add in place; the last one is called twice, and dropout stands behind its second call's sum."""

    latent_module = "blocks.1"

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.lift = nn.Conv2d(channels, 8, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3)
        )
        self.quiet, self.drop, self.head = nn.Dropout(0.0), nn.Dropout2d(0.3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.lift(x)
        for block in [*self.blocks, self.blocks[2]]:
            z = self.quiet(z)  # of rate 0: no noise
            z += block(z.clone())
        return self.head(self.drop(z))


class Encoder(nn.Module):
    """torch's own transformer over pixels, sequence first, with a tuple on the way."""

    latent_module = "embed"

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.first = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.second = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        z, _ = self.lstm(self.embed(x.flatten(2).transpose(1, 2)))
        z = self.second(self.first(z.transpose(0, 1))).transpose(0, 1)
        return self.head(z).transpose(1, 2).reshape(x.shape[0], 4, *x.shape[2:])


def vit(channels: int = 4) -> nn.Module:
    model = ViT(ViTConfig(channels=channels, grid=(8, 8), patch=4, width=16, depth=2, heads=2, refine=4, dropout=0.2))
    nn.init.normal_(model.out.weight, std=0.1)
    return model if channels == 4 else nn.Sequential(model, nn.Conv2d(channels, 4, 1))


MODELS = {"conv": lambda channels: DropNet(channels, 4), "residual": Residual, "encoder": Encoder, "vit": vit}
NOISES = {
    "dropout": {},
    "at another rate": {"dropout_p": 0.4},
    "injected": {"dropout_p": 0.2, "dropout_after": ("AFTER",)},
    "latent": {"dropout": False, "latent_sigma": 0.1, "latent_at": "AFTER"},
    "input": {"dropout": False, "input_eps": 0.1},
    "all": {"dropout_p": 0.2, "dropout_after": ("AFTER",), "latent_sigma": 0.1, "latent_at": "AFTER", "input_eps": 0.1, "antithetic": True},
}
AFTER = {"conv": "norm", "residual": "blocks.1", "encoder": "first", "vit": "blocks.0"}


def surrogate(kind: str, noise: str = "dropout", history: int = 1) -> Surrogate:
    torch.manual_seed(0)
    at = ("0." if kind == "vit" and history > 1 else "") + AFTER[kind]
    named = {k: at if v == "AFTER" else (at,) if v == ("AFTER",) else v for k, v in NOISES[noise].items()}
    return Surrogate(MODELS[kind](4 * history), SPEC, history=history, predicts="delta", stochastic=named)


def draw(fm: Surrogate, x: Tensor, ids: Tensor = IDS, first: int = 5) -> Tensor:
    return fm.candidates(x, ids, seed=3, step=1, problem_ids=torch.arange(len(x)) + first)


def one_by_one(fm: Surrogate, x: Tensor) -> Tensor:
    return torch.stack([torch.cat([draw(fm, x[n : n + 1], i, 5 + n)[0] for i in IDS.split(1)]) for n in range(len(x))])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", MODELS)
def test_candidates_of_one_call_are_those_of_a_call_each(kind, noise):
    fm, x = surrogate(kind, noise), euler_state(3)
    torch.testing.assert_close(draw(fm, x), one_by_one(fm, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_with_history_too(kind):
    fm, window = surrogate(kind, history=2), torch.stack([euler_state(2, seed=0), euler_state(2, seed=1)], 1)
    torch.testing.assert_close(draw(fm, window), one_by_one(fm, window), rtol=1e-5, atol=1e-5)


def test_under_the_callers_autocast_too():
    fm, x = surrogate("vit"), euler_state(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(draw(fm, x), one_by_one(fm, x), rtol=0.02, atol=0.02)
    draw(fm, x)
    assert len(fm._candidates._traces) == 2


def test_another_model_may_take_the_place():
    fm = surrogate("conv")
    x = euler_state(2)
    first = draw(fm, x)
    fm.model = copy.deepcopy(fm.model)
    torch.nn.init.zeros_(fm.model.head.weight)
    assert not torch.equal(draw(fm, x), first)
    assert fm._candidates.model is fm.model


def test_copies_find_out_for_themselves():
    fm = surrogate("conv")
    x = euler_state(2)
    before = draw(fm, x)
    for other in (copy.deepcopy(fm), pickle.loads(pickle.dumps(fm))):
        with torch.no_grad():
            other.model.lift.weight.mul_(2)
        assert torch.equal(draw(fm, x), before) and not torch.equal(draw(other, x), before)
        assert other._candidates.model is other.model and len(other._candidates._traces) == 1


def test_a_model_or_module_that_is_replaced_is_the_one_called():
    x = euler_state(2)
    fm = Surrogate(DropNet(), SPEC)
    draw(fm, x)
    for replace in (lambda: setattr(fm, "model", DropNet()), lambda: setattr(fm.model, "lift", nn.Conv2d(4, 8, 1))):
        replace()
        torch.testing.assert_close(draw(fm, x), draw(Surrogate(fm.model, SPEC), x))

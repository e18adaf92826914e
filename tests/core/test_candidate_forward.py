"""Candidates whose common part runs once are those of the unshared forward, for every kind of noise and several kinds of models."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.surrogates import DropNet, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.models.vit import ViT, ViTConfig
from ttcfast.spec import StateSpec

SPEC = StateSpec.euler2d()


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


def pair_of(kind: str, noise: str, history: int = 1) -> tuple[Surrogate, Surrogate]:
    """Sharing, and not."""
    torch.manual_seed(0)
    at = ("0." if kind == "vit" and history > 1 else "") + AFTER[kind]
    named = {k: at if v == "AFTER" else (at,) if v == ("AFTER",) else v for k, v in NOISES[noise].items()}
    model = MODELS[kind](4 * history)
    return tuple(  # type: ignore[return-value]
        Surrogate(model, SPEC, history=history, predicts="delta", stochastic=named, share_prefix=share) for share in (True, False)
    )


def draw(fm: Surrogate, x: Tensor, count: int = 4) -> Tensor:
    return fm.candidates(x, torch.arange(1, count + 1), seed=3, step=1, problem_ids=torch.arange(len(x)) + 5)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", MODELS)
def test_shared_candidates_are_the_unshared_ones(kind, noise):
    shared, unshared = pair_of(kind, noise)
    for n in (1, 3):
        x = euler_state(n)
        torch.testing.assert_close(draw(shared, x), draw(unshared, x), rtol=1e-5, atol=1e-5)
    (prefix,) = shared._candidates._prefixes.values() if NOISES[noise].get("input_eps", 0) == 0 else (None,)
    expected = {
        ("conv", "dropout"): ["lift", "norm"],
        ("residual", "dropout"): ["lift", "quiet", "blocks.0", "quiet", "blocks.1", "quiet", "blocks.2", "quiet", "blocks.2"],
        ("residual", "at another rate"): ["lift"],  # which switches on the dropout of rate 0
        ("encoder", "dropout"): ["embed", "lstm", "first"],
        ("encoder", "latent"): ["embed", "lstm", "first"],
        ("vit", "dropout"): ["embed", "blocks.0.local", "blocks.0.norm1", "blocks.0.attention"],
        ("vit", "latent"): ["embed", "blocks.0"],
    }.get((kind, noise))
    assert expected is None or prefix.shared == expected


@pytest.mark.parametrize("kind", MODELS)
def test_with_history_too(kind):
    shared, unshared = pair_of(kind, "dropout", history=2)
    window = torch.stack([euler_state(2, seed=0), euler_state(2, seed=1)], 1)
    torch.testing.assert_close(draw(shared, window), draw(unshared, window), rtol=1e-5, atol=1e-5)
    assert all(p.reason is None and p.shared for p in shared._candidates._prefixes.values())


def test_it_is_checked_once_for_each_kind_of_noise_and_state_and_said_once(caplog):
    shared, _ = pair_of("conv", "dropout")
    calls = shared.model.calls
    with caplog.at_level("INFO", logger="ttcfast"):
        for n in (2, 2, 1, 3):
            draw(shared, euler_state(n))
    assert calls == [2, 4, 2, 4, 2, 4] + [2, 8, 2, 8, 1, 4, 3, 12]  # the check, and two calls for each of four
    assert caplog.text.count("candidates share what precedes the first noise: lift, norm") == 1
    caplog.clear()
    with caplog.at_level("INFO", logger="ttcfast"):
        shared.candidates(euler_state(2), torch.arange(4), seed=0, step=0, stochastic={"dropout_p": 0.1, "dropout_after": ("lift",)})
        draw(shared, euler_state(2, size=6))
    assert caplog.text.count("DropNet: candidates share") == 2


def test_hooks_that_are_added_later_see_every_row():
    shared, unshared = pair_of("conv", "dropout")
    x, seen = euler_state(2), []
    draw(shared, x)
    draw(unshared, x)
    shared.model.lift.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    draw(shared, x)
    draw(unshared, x)
    torch.testing.assert_close(seen[-2], seen[-1])


def test_a_model_that_leaves_its_path_is_called_whole(caplog):
    class Turns(DropNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.amax() < 100 else self.head(self.drop(self.lift(x)))

    model = Turns()
    shared, unshared = (Surrogate(model, SPEC, share_prefix=share) for share in (True, False))
    torch.testing.assert_close(draw(shared, euler_state(2)), draw(unshared, euler_state(2)))
    for _ in range(2):
        torch.testing.assert_close(draw(shared, 100 * euler_state(2)), draw(unshared, 100 * euler_state(2)))
    assert caplog.text.count("Turns took another path through its modules than when it was checked") == 1
    torch.testing.assert_close(draw(shared, euler_state(2)), draw(unshared, euler_state(2)))


def test_under_the_callers_autocast_too():
    shared, unshared = pair_of("vit", "dropout")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = draw(shared, euler_state(2)), draw(unshared, euler_state(2))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    (prefix,) = shared._candidates._prefixes.values()
    assert prefix.reason is None
    draw(shared, euler_state(2))
    assert len(shared._candidates._prefixes) == 2


def test_another_model_may_take_the_place():
    shared, _ = pair_of("conv", "dropout")
    x = euler_state(2)
    first = draw(shared, x)
    shared.model = copy.deepcopy(shared.model)
    torch.nn.init.zeros_(shared.model.head.weight)
    assert not torch.equal(draw(shared, x), first)
    assert shared._candidates.model is shared.model and shared._candidates.share_prefix


def test_copies_find_out_for_themselves():
    shared, _ = pair_of("conv", "dropout")
    x = euler_state(2)
    before = draw(shared, x)
    for other in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        with torch.no_grad():
            other.model.lift.weight.mul_(2)
        assert torch.equal(draw(shared, x), before) and not torch.equal(draw(other, x), before)
        assert other._candidates.model is other.model and len(other._candidates._prefixes) == 1


class Mixed(nn.Module):
    """Halves of the states behind one another, so that the rows of a state do not lie together."""

    def __init__(self) -> None:
        super().__init__()
        self.halves, self.drop, self.head = Halves(), nn.Dropout(0.3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = self.halves(x).chunk(2)
        return self.head(self.drop(torch.cat([upper, lower], 2)))


class Halves(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat(x.chunk(2, 2)))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_state_that_tells_nothing_apart_does_not_settle_what_is_shared(value):
    torch.manual_seed(0)
    model = Mixed()
    shared, unshared = (Surrogate(model, SPEC, share_prefix=share) for share in (True, False))
    draw(shared, torch.full((2, 4, 8, 8), value))
    assert torch.equal(draw(shared, euler_state(2)), draw(unshared, euler_state(2)))


def test_a_model_or_module_that_is_replaced_is_the_one_called():
    x = euler_state(2)
    fm = Surrogate(DropNet(), SPEC)
    draw(fm, x)
    for replace in (lambda: setattr(fm, "model", DropNet()), lambda: setattr(fm.model, "lift", nn.Conv2d(4, 8, 1))):
        replace()
        torch.testing.assert_close(draw(fm, x), draw(Surrogate(fm.model, SPEC, share_prefix=False), x))
